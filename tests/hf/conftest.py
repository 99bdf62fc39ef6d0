"""A run and models of transformers for the tests of import and export, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.resume_worker import train_alone


@pytest.fixture(scope="session")
def tokenizer(sample_prefix: Path) -> Path:
    """The SentencePiece file of the sample corpus."""
    return sample_prefix.with_name("docs.tokenizer.model")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Callable[[str], Path]:
    """Makes each model of MODELS once: `NAME/theirs`, imported in `NAME/ours`."""
    from sepllm_train.hf.importing import import_model
    from tests.hf.bridge_models import MODELS, make_model

    root = tmp_path_factory.mktemp("models")

    def made(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            make_model(folder / "theirs", name, tokenizer)
            import_model(folder / "theirs", folder / "ours", attention=MODELS[name][2])
        return folder

    return made


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, sample_cache: Path) -> Path:
    """A run of two steps on the sample corpus: GPT-NeoX in bf16, first and last layer full, documents separated."""
    return train_alone(
        tmp_path_factory.mktemp("runs"),
        sample_cache,
        "books_sep",
        attention={"full_layers": "first_last", "separate_documents": True},
        data={"validation_fraction": 0.05},
        training={"steps": 2, "precision": "bf16", "checkpoint_interval": 2},
    )


@pytest.fixture(scope="session")
def exported(trained: Path) -> Path:
    """The trained run, exported."""
    from sepllm_train.hf.export import export_run
    from sepllm_train.runs.open import open_run

    export_run(open_run(trained), trained.parent / "exported")
    return trained.parent / "exported"

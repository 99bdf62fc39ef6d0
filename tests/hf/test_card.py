"""The model card has what the run recorded, and no more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is an optional package: extra hf")

from sepllm_train.hf.card import model_card
from sepllm_train.runs.average import average_checkpoints
from sepllm_train.runs.open import open_run
from tests.training.resume_worker import train_alone


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, sample_cache: Path) -> Path:
    """A run of two steps with a checkpoint and a validation after each."""
    return train_alone(
        tmp_path_factory.mktemp("runs"),
        sample_cache,
        "recorded",
        data={"validation_fraction": 0.05},
        training={"steps": 2, "validation_interval": 1, "validation_samples": 2},
    )


def card_of(folder: Path, step: int | None = None) -> str:
    return model_card(open_run(folder, step), "GPTNeoXForCausalLM", {"dense": 1e-6, "sep": 2e-6}, "bf16", None)


def record(folder: Path, key: str, step: int) -> dict[str, Any]:
    """The record of `step` that has `key`."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(entry for entry in found if key in entry and entry["step"] == step)


@pytest.mark.parametrize("step", [1, 2])
def test_facts_are_those_of_the_records_until_the_checkpoint(recorded: Path, step: int) -> None:
    card, info = card_of(recorded, step), json.loads((recorded / "run.json").read_text())
    training, validation = record(recorded, "train/loss", step), record(recorded, "val/loss", step)
    ((name, data),) = info["comparable"]["data"].items()
    assert f"- data: `{name}`, SHA-256 `{data['sha256']}`\n" in card
    assert f"- tokenizer: `docs.tokenizer.model`, SHA-256 `{info['comparable']['tokenizer']}`\n" in card
    assert f"- {128 * step} tokens in {step} steps, {training['seconds']:,.0f} seconds on 1 x CPU\n" in card
    assert f"- {training['flops/model']:.3g} FLOPs; {training['flops/dense']:.3g} with full attention\n" in card
    assert f"- training loss {training['train/loss']:.4f} at step {step}\n" in card
    bits = validation["val/bits_per_byte"]
    assert f"- validation loss {validation['val/loss']:.4f}, {bits:.4f} bits per byte, at step {step}\n" in card


def test_what_is_not_on_record_is_left_out(recorded: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(recorded, run)
    (run / "environment.json").write_text(json.dumps({"command": ["sepllm pretrain", "name=a b"]}))
    assert "```bash\nsepllm pretrain 'name=a b'\n```" in card_of(run)
    (run / "environment.json").unlink()
    (run / "metrics.jsonl").unlink()
    card = card_of(run)
    assert "- tokenizer: `docs.tokenizer.model`" in card
    assert not any(word in card for word in ("Command", "FLOPs", "seconds", "training loss", "validation loss"))


def test_average_and_import(recorded: Path, models: Callable[[str], Path], tmp_path: Path) -> None:
    average_checkpoints(recorded, [1, 2], tmp_path / "mean")
    card = card_of(tmp_path / "mean")
    assert "Mean of the checkpoints of steps 1, 2" in card and "FLOPs" in card and "- data: `" in card
    # The losses on record are those of checkpoints, not of their mean.
    assert "training loss" not in card and "validation loss" not in card
    card = card_of(models("neox") / "ours")
    assert "- imported from the transformers model `theirs`, not trained since" in card and "FLOPs" not in card


def test_card_of_an_export_says_how_to_load_it(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert 'from_pretrained("FOLDER", trust_remote_code=True)' in card and 'load_model("FOLDER")' in card
    assert "by `modeling_sepllm.py` alone" in card

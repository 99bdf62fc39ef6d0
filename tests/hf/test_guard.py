"""Copies of an exported model: whatever transformers writes of it does not attend fully in silence either."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers

from sepllm_train.hf import apply_pattern, load_model, make_pattern, trained_pattern
from tests.hf.tiny_models import SEPARATORS, random_rows, tiny
from tests.support.waiting import HANG_SECONDS

PLAIN = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except (ValueError, RuntimeError) as error:
        assert 'attn_implementation="sepllm"' in str(error), error
        continue
    print(folder, "loaded without a word")
"""


@pytest.fixture
def model() -> Any:
    """A model that was trained with a pattern."""
    made = tiny("llama")
    made.config.sepllm_attention = make_pattern(made, window=6, initial=3, separators=SEPARATORS).to_dict()
    return made


@pytest.fixture
def exported(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "exported")
    return tmp_path / "exported"


def full(folder: Path) -> Any:
    """A model that somebody wants to see with full attention, without our loader."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


def with_other_class(folder: Path) -> Any:
    return transformers.LlamaForSequenceClassification.from_pretrained(folder, attn_implementation="eager")


def merged(folder: Path) -> Any:
    """As adapters are merged: a deep copy whose weights are changed in place."""
    made = copy.deepcopy(load_model(str(folder)))
    with torch.no_grad():
        made.model.layers[0].mlp.up_proj.weight.add_(0.01)
    return made


def in_half(folder: Path) -> Any:
    return load_model(str(folder), dtype=torch.bfloat16)


def from_configuration(folder: Path) -> Any:
    made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    made.load_state_dict(full(folder).state_dict())
    return made


COPIES: dict[str, Callable[[Path], Any]] = {
    "loaded": lambda folder: load_model(str(folder)),
    "loaded dense": lambda folder: load_model(str(folder), dense=True),
    "loaded with a mask": lambda folder: apply_pattern(load_model(str(folder), dense=True), implementation="mask"),
    "unknown attention": transformers.AutoModelForCausalLM.from_pretrained,
    "full": full,
    "other class": with_other_class,
    "deep copy": merged,
    "pickled": lambda folder: pickle.loads(pickle.dumps(full(folder))),
    "half": in_half,
    "configuration": transformers.AutoConfig.from_pretrained,
    "copied configuration": lambda folder: copy.deepcopy(transformers.AutoConfig.from_pretrained(folder)),
    "built again": from_configuration,
}


def test_copies_are_refused_by_transformers_alone(exported: Path, tmp_path: Path) -> None:
    folders = [exported]
    for name, make in COPIES.items():
        folders.append(tmp_path / name)
        make(exported).save_pretrained(folders[-1])
        if not (folders[-1] / "model.safetensors").exists():
            (folders[-1] / "model.safetensors").symlink_to(exported / "model.safetensors")
    # A copy of a copy.
    folders.append(tmp_path / "second")
    load_model(str(tmp_path / "full"), dense=True).save_pretrained(folders[-1])
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, *map(str, folders)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=HANG_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr[-2000:]


def test_copy_attends_by_its_pattern(model: Any, exported: Path, tmp_path: Path) -> None:
    """And with this package but not its loader too."""
    (row,) = random_rows((50,))
    with torch.no_grad():
        expected = apply_pattern(model)(input_ids=row[None]).logits
        load_model(str(exported)).save_pretrained(tmp_path / "copy")
        found = load_model(str(tmp_path / "copy"))(input_ids=row[None]).logits
        torch.testing.assert_close(found, expected)
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy")(input_ids=row[None]).logits
        torch.testing.assert_close(found, expected)


def test_copy_that_lost_the_guard_has_it_with_this_package(exported: Path, tmp_path: Path) -> None:
    """Such as one that an older version of this package wrote."""
    program = f"""
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(exported)!r}, attn_implementation="sdpa").save_pretrained({str(tmp_path / "copy")!r})
"""  # noqa: E501
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=HANG_SECONDS, check=True)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert again.base_model.sepllm_pattern.pattern.windows == (6, 6)
    assert not trained_pattern(load_model(str(tmp_path / "copy")).config).dense


def test_pattern_that_is_taken_out_of_the_configuration_takes_the_guard_along(
    model: Any, exported: Path, tmp_path: Path
) -> None:
    """For a model that was trained further with full attention."""
    for number, trained in enumerate((model, load_model(exported, dense=True))):
        folder = tmp_path / str(number)
        del trained.config.sepllm_attention
        assert trained_pattern(trained.config) is None and not hasattr(trained.config, "sepllm_attention")
        trained.save_pretrained(folder)
        assert "sepllm" not in (folder / "config.json").read_text().lower()
        assert not (folder / "modeling_sepllm.py").exists()
        assert full(folder).config._attn_implementation == "sdpa"

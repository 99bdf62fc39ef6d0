"""Runs with training.compile, started as a user starts them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sepllm_train.training.checkpoint import digests

# A second of silence is a hang, and each compilation takes longer than that on a slow machine.
COMPILED = (
    "training.compile=true",
    "training.loss_chunk=100",
    "training.deterministic=true",
    "training.hang_seconds=4",
)


@pytest.mark.slow
def test_compiled_run_resumes_bitwise_or_uncompiled(trainer: Any, finished: Any, compile_cache: None) -> None:
    outcome = trainer("name=compiled", *COMPILED, "training.validation_interval=0")
    assert outcome.code == 0, outcome.errors[-3000:]
    assert (
        "compute: what is between the matrix products of a layer is compiled in the first step | loss over chunks"
        in (outcome.output)
    )
    (line,) = re.findall(r"^compiled: (\d+) forward and backward functions in [\d.]+ s$", outcome.output, re.MULTILINE)
    assert int(line) > 8
    losses = trainer.values("compiled", "train/loss")
    eager = finished("plain", "training.validation_interval=0")
    assert losses == pytest.approx(trainer.values(eager, "train/loss"), abs=1e-5)

    half = trainer.root / "compiled" / "checkpoints" / "step_00000002"
    for name, overrides in (("compiled_again", COMPILED), ("uncompiled", ())):
        outcome = trainer(f"name={name}", f"resume={half}", *overrides, "training.validation_interval=0")
        assert outcome.code == 0, outcome.errors[-3000:]
    assert trainer.values("compiled_again", "train/loss") == losses[2:]
    whole, again = (dict(digests(trainer.root / name)) for name in ("compiled", "compiled_again"))
    assert again == whole and whole.keys() == dict(digests(trainer.root / eager)).keys()
    assert trainer.values("uncompiled", "train/loss") == pytest.approx(losses[2:], abs=1e-5)

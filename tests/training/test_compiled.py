"""Runs with training.compile."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sepllm_train.training.checkpoint import digests
from sepllm_train.training.guards import ALLOWED_SECONDS, Compilation

COMPILED = (
    "training.compile=true",
    "training.loss_chunk=100",
    "training.deterministic=true",
)


def test_watchdog_waits_for_a_compilation() -> None:
    allowed: list[float] = []
    watchdog: Any = SimpleNamespace(allow=allowed.append)
    torch._dynamo.reset()
    with Compilation(watchdog) as compilation:
        doubled = torch.compile(lambda x: 2 * x, backend="eager")
        assert doubled(torch.ones(1)) == 2 and allowed == [ALLOWED_SECONDS, 0.0]
        assert doubled(torch.ones(1)) == 2 and allowed == [ALLOWED_SECONDS, 0.0]
    assert compilation.graphs == 1


@pytest.mark.slow
def test_compiled_run_resumes_bitwise_or_uncompiled(trainer: Any, finished: Any, compile_cache: None) -> None:
    outcome = trainer("name=compiled", *COMPILED, "training.validation_interval=0")
    assert outcome.code == 0, outcome.errors[-3000:]
    assert (
        "compute: operations between the matrix products of a layer are compiled in the first step | loss over chunks"
        in outcome.unfolded
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

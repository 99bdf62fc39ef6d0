"""Runs on a GPU, which CI has none of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sepllm_train.training.checkpoint import digests

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_resumes_bitwise(precision: str, compiled: bool, trainer: Any, compile_cache: None) -> None:
    """The optimizer is the fused one, whose count of updates lies on the device."""
    name = f"gpu_{precision}_{compiled}"
    overrides = (
        "model.heads=2",  # of a size that the kernels take
        f"training.precision={precision}",
        f"training.compile={str(compiled).lower()}",
        "training.deterministic=true",
        "training.validation_interval=0",
    )
    outcome = trainer(f"name={name}", *overrides)
    assert outcome.code == 0, outcome.errors[-3000:]
    half = trainer.root / name / "checkpoints" / "step_00000002"
    outcome = trainer(f"name={name}_again", f"resume={half}", *overrides)
    assert outcome.code == 0, outcome.errors[-3000:]
    assert trainer.values(f"{name}_again", "train/loss") == trainer.values(name, "train/loss")[2:]
    assert dict(digests(trainer.root / f"{name}_again")) == dict(digests(trainer.root / name))

"""A run with context parallelism, started as a user starts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.distributed


def test_context_run_equals_one_process(trainer: Any, finished: Callable[..., str]) -> None:
    """Same losses; the line before the first step tells what is sent, and the metrics hold what was."""
    outcome = trainer("name=context", "parallel.context=2", processes=2)
    assert outcome.code == 0, outcome.errors[-3000:]
    one = finished("one")
    for key in ("train/loss", "val/loss", "val/bits_per_byte", "train/grad_norm", "train/attended_share"):
        values = trainer.values(one, key)
        assert len(values) > 0 and trainer.values("context", key) == pytest.approx(values, rel=1e-5), key
    assert "context 2 x data 1" in outcome.output
    line = next(line for line in outcome.unfolded.splitlines() if line.startswith("context: "))
    assert "2 of 4 chunks" in line and "separators and 63 local keys" in line
    # Forward and backward in each layer for each sequence; the line's figure is of the first samples alone.
    told = float(line.split(" MiB per layer")[0].split()[-1]) * 2**20
    layers, sequences = 2, 4
    for sent in trainer.values("context", "train/context_bytes"):
        assert sent == pytest.approx(2 * told * layers * sequences, rel=0.25)
    assert trainer.values(one, "train/context_bytes") == []

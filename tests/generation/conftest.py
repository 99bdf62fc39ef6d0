"""One process as megatron-core's whole grid, and a run to generate from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sepllm_train.distributed.launch import alone
from tests.training.resume_worker import train_alone


@pytest.fixture(scope="module")
def grid() -> Iterator[torch.device]:
    """The device of a single-process grid, which lives as long as the test module."""
    with alone() as device:
        yield device


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, sample_cache: Path) -> Path:
    """A run of two steps on the sample corpus with a checkpoint of each."""
    training = {"steps": 2, "checkpoint_interval": 1}
    return train_alone(tmp_path_factory.mktemp("runs"), sample_cache, "small", training=training)

"""One small trained run that the tests of the analysis read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sepllm_train.config.schema import AttentionConfig
from sepllm_train.distributed.launch import alone
from sepllm_train.runs.open import TrainedRun, open_run
from tests.support.small_run import SMALL_MODEL, train_here

TRAINING = [
    "+experiment=demo_sep",
    *SMALL_MODEL,
    "attention.window=[8,16]",
    "attention.separators=[period,comma,newline]",
    "training.steps=4",
    "training.validation_samples=5",
    "training.validation_interval=0",
    "training.checkpoint_interval=2",
    "name=small",
]


@dataclass(frozen=True)
class Trained:
    """A finished run: its folder and the records of metrics.jsonl."""

    folder: Path
    records: list[dict[str, Any]]


@pytest.fixture(scope="session")
def trained(sample_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of two layers with windows 8 and 16 on 128 tokens."""
    root = tmp_path_factory.mktemp("runs")
    train_here(*TRAINING, f"run_root={root}", f"data.cache={sample_cache}")
    lines = (root / "small" / "metrics.jsonl").read_text().splitlines()
    return Trained(root / "small", [json.loads(line) for line in lines])


@pytest.fixture(scope="module")
def grid() -> Iterator[torch.device]:
    """The device of a single-process grid, which lives as long as the test module."""
    with alone() as device:
        yield device


@pytest.fixture(scope="module")
def run(trained: Trained, grid: torch.device) -> TrainedRun:
    """The run, opened."""
    return open_run(trained.folder)


def with_attention(run: TrainedRun, attention: AttentionConfig) -> TrainedRun:
    """The run as if it had been trained with another attention, with the same weights and text."""
    other = replace(run, config=replace(run.config, attention=attention))
    other.__dict__.update(model=run.model, corpus=run.corpus)
    return other

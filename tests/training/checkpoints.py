"""A small model in one process and its checkpoints, for the tests that save and load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sepllm_train.config.schema import Config, ModelConfig, TrainingConfig
from sepllm_train.training.checkpoint import (
    Saver,
    files,
)
from sepllm_train.training.setup import Training
from sepllm_train.training.state import TrainState

VOCABULARY = 1000


def config_of(root: Path, **training: Any) -> Config:
    """A run named `run` under `root`."""
    return Config(
        name="run",
        run_root=str(root),
        model=ModelConfig(layers=2, hidden=64, heads=4, ffn=128),
        training=TrainingConfig(**({"precision": "fp32", "steps": 100} | training)),
    )


def update(training: Training) -> None:
    """One step of Adam along random gradients."""
    for chunk in training.chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.normal_()
    training.optimizer.step()


def saver_for(root: Path, training: Training, **settings: Any) -> Saver:
    """The writer of the run's checkpoints."""
    defaults = {"keep": 2, "kept": lambda step: False, "background": True}
    return Saver(root / "run", training, {"identity": {}, "schedule": {}}, **(defaults | settings))


def save_steps(root: Path, training: Training, *steps: int, **settings: Any) -> list[Path]:
    """A checkpoint after each of `steps`, with an update between them."""
    saver = saver_for(root, training, **settings)
    for step in steps:
        update(training)
        saver.save(TrainState(step=step, tokens=10 * step))
    saver.finish()
    return [files.step_folder(root / "run" / "checkpoints", step) for step in steps]

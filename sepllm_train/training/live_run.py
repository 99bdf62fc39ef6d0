"""The parts of a run in training, for its loop, its log and its validation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch import Tensor

from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import Config
from sepllm_train.training.checkpoint import whole_weights
from sepllm_train.training.facts import Facts
from sepllm_train.training.guards import Guards
from sepllm_train.training.schedules import StepSchedule
from sepllm_train.training.setup import Training
from sepllm_train.training.state import TrainState
from sepllm_train.training.step import Stepper


@dataclass(frozen=True)
class LiveRun:
    """A run on this rank, from the model on; `state` and what `training` holds change with each step."""

    config: Config
    folder: Path
    facts: Facts
    schedule: StepSchedule
    training: Training
    stepper: Stepper
    state: TrainState
    guards: Guards
    device: torch.device

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights as checkpoints hold them: names and whole tensors on the CPU. Every rank iterates to the end.

        Raises UserError, on every rank, for weights that are not finite.
        """
        for name, whole in whole_weights(self.training.modules):
            self.guards.watchdog.allow(0.0)
            if not whole.isfinite().all():
                raise UserError(f"the weights {name} have values that are NaN or infinite.")
            yield name, whole

    @property
    def replica(self) -> int:
        """Number of the data-parallel replica that this rank belongs to."""
        return int(parallel_state.get_data_parallel_rank())

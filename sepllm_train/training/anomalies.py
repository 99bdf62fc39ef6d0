"""Steps whose loss or gradients are unusable: they are recognised before the optimizer sees them, and left out."""

from __future__ import annotations

import math
import statistics
from typing import Any

from sepllm_train.base.errors import BadSteps
from sepllm_train.config.schema import TrainingConfig
from sepllm_train.training.state import TrainState

# Gradient norms behind the median of the spike test, and how many it takes before the test begins.
RECENT = 128
ENOUGH = 16


def not_finite(loss: float, grad_norm: float) -> str | None:
    """Why a step cannot be used whatever came before it, or None.

    loss: mean over the batch, nats per token. grad_norm: before clipping.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the gradient norm is {grad_norm}"
    return None


class BadStepDetector:
    """Judges each step; what it remembers is in the TrainState, so that a resumed run judges alike.

    A spike is a gradient norm above `training.spike_factor` times the median of the last RECENT norms of steps that
    were used. It is the norm that is watched, not the loss: it tells of a bad batch before the update, where the loss
    tells of a bad update after it, when leaving out a step no longer helps.
    """

    def __init__(self, config: TrainingConfig, state: TrainState) -> None:
        self.config = config
        self.state = state

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why the step of this mean loss (nats per token) and gradient norm must be skipped, None when it is good.

        All ranks give the same values, so all decide the same.
        """
        state = self.state
        reason = not_finite(loss, grad_norm) or self._spike(grad_norm)
        if reason is None:
            state.bad_in_a_row = 0
            state.recent_norms = [*state.recent_norms, grad_norm][-RECENT:]
        else:
            state.bad_steps += 1
            state.bad_in_a_row += 1
        return reason

    def _spike(self, grad_norm: float) -> str | None:
        """Why a finite gradient norm is too large, or None."""
        factor, norms = self.config.spike_factor, self.state.recent_norms
        if factor == 0 or len(norms) < ENOUGH:
            return None
        usual = statistics.median(norms)
        if grad_norm <= factor * usual:
            return None
        return f"the gradient norm {grad_norm:.4g} is above training.spike_factor={factor:g} x the usual {usual:.4g}"

    @property
    def exhausted(self) -> bool:
        """Whether the last step ends a row of training.max_bad_steps bad ones."""
        limit = self.config.max_bad_steps
        return 0 < limit <= self.state.bad_in_a_row

    def failure(self, step: int, reason: str) -> BadSteps:
        """Why the run ends after `step` (from 1), which was bad for `reason`."""
        return BadSteps(
            f"{self.state.bad_in_a_row} steps in a row up to step {step} were skipped ({reason}): lower optim.lr, or "
            f"look at the documents in bad_steps.jsonl; training.max_bad_steps={self.config.max_bad_steps} sets how "
            "many may be. Checkpoints from before are kept."
        )

    def failure_of_run(self, reason: str | None, validation_loss: float | None) -> BadSteps | None:
        """Why a run is of no use after its last step, or None.

        reason: why the last step was bad, if it was; validation_loss: after it, in nats per token, None without one.
        """
        steps = self.config.steps
        if self.state.bad_steps + self.state.overflows >= steps:
            return BadSteps(
                f"all {steps} steps of the run were skipped, the last one because {reason or 'fp16 overflowed'}: the "
                "weights are those it began with. "
                + (
                    "Lower optim.lr, or look at the documents in bad_steps.jsonl."
                    if self.state.bad_steps
                    else "fp16's loss scale had no time to fall: train for more steps, or in bf16."
                )
            )
        if validation_loss is not None and not math.isfinite(validation_loss):
            return BadSteps(
                f"the validation loss after the last step is {validation_loss}: lower optim.lr under another name=. "
                "The last step is not saved; checkpoints from before are kept."
            )
        return None


def documents_of(dataset: Any, samples: range) -> dict[str, list[int]]:
    """Documents that the samples of a training dataset are cut from: prefix -> their numbers in its .idx, sorted."""
    found: dict[str, set[int]] = {}
    for sample in samples:
        prefix, numbers = dataset.documents(sample)
        found.setdefault(prefix, set()).update(numbers)
    return {prefix: sorted(numbers) for prefix, numbers in found.items()}

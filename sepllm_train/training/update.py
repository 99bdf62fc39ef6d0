"""The end of a step: one reduction over all ranks, the judgement it allows, and the optimizer's update.

megatron-core's `optimizer.step()` clips and updates in one go. Here its parts are called one by one, because whether
the weights may be touched is decided by the loss and the gradient norm of the whole batch: a step whose loss or
gradients are unusable is recognised before the optimizer sees them, and left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from sepllm_train.base.errors import BadSteps
from sepllm_train.config.schema import TrainingConfig
from sepllm_train.training.state import TrainState

# (mean loss, gradient norm) -> why the step must be skipped, or None.
Judge = Callable[[float, float], str | None]


@dataclass(frozen=True)
class Update:
    """Result of the reduction and fate of the step; the same on every rank.

    `loss`: mean over the labels of the batch that count, nats per token; 0 without any. `grad_norm`: before clipping,
    inf when fp16 gradients overflowed. `overflow`: the step was skipped and the loss scale lowered. `bad`: why the step
    was skipped otherwise, or None. `sums`: the caller's own numbers, summed over ranks.
    """

    loss: float
    grad_norm: float
    overflow: bool
    bad: str | None
    sums: list[float]


@torch.no_grad()
def update(
    optimizer: MegatronOptimizer, loss: Tensor, counted: Tensor, micro_batches: int, own: Sequence[float], judge: Judge
) -> Update:
    """Take the optimizer's step unless `judge` objects; then weights and optimizer state stay as they are.

    `loss`, `counted` f64 scalars of a StepResult. `micro_batches`: what `counted` comes to over all ranks when every
    label counts. `own`: numbers to be summed over all ranks on the way. Every rank calls it; it waits for the device
    once, as reading a gradient norm does.

    The gradients are those of a mean over all labels in which masked ones are 0. Multiplied by labels over counted
    labels they are those of the mean over the counted labels of the batch, whatever micro-batches and ranks have them.
    """
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    overflow = optimizer.prepare_grads()
    # Replicas that hold the same parameters hold the same gradients, so each square is summed as often.
    copies = dist.get_world_size() / dist.get_world_size(optimizer.get_grad_stats_parallel_group())
    square = torch.zeros_like(loss)
    if not overflow:
        grads = [grad for part in parts for grad in _norm_grads(part)]
        square += square_sum(grads).to(square) / copies
    # Summed over the world, not over the ranks of one replica: then all judge by the very same numbers.
    totals = torch.cat((torch.stack((loss, square, counted)), torch.tensor(own, dtype=loss.dtype, device=loss.device)))
    dist.all_reduce(totals)
    total, squares, seen, *sums = totals.tolist()
    mean, scale = (total / seen, micro_batches / seen) if seen else (0.0, 1.0)
    norm = math.inf if overflow else math.sqrt(squares) * scale if squares >= 0 else math.nan
    # An overflow of fp16 is the loss scale's business as long as the scale can still fall.
    judged = not overflow or not math.isfinite(mean) or _lowest_scale(parts)
    bad = judge(mean, norm) if judged else None
    if bad is None and not overflow:
        for part in parts:
            if scale != 1:
                torch._foreach_mul_([p.grad for p in part.get_parameters() if p.grad is not None], scale)
            limit = part.config.clip_grad
            if 0 < limit < norm:
                # All at once: megatron-core's takes two kernels for each gradient where apex is missing.
                clip_grads_with_norm_(part.get_parameters(), limit, torch.tensor(norm))
        optimizer.step_with_ready_grads()
    return Update(mean, norm, overflow, bad, sums)


def _norm_grads(part: MegatronOptimizer) -> list[Tensor]:
    """The gradients that count for the norm; megatron-core 0.19 renamed the method."""
    method = getattr(part, "get_grads_for_grad_norm", None) or part.get_main_grads_for_grad_norm
    return method()


# Elements whose squares are added up in single precision.
_RUN = 1024


def square_sum(grads: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements, an f64 scalar, to a relative 1e-7 for gradients in single precision.

    A norm on the CPU adds up the squares of a whole tensor one after the other: over the 39 million elements of an
    embedding it is low by 3e-3, and otherwise for its half on another rank. Runs of _RUN elements lose nothing that
    shows, and their sums are added in double precision. GPUs add in a tree.
    """
    if grads and grads[0].is_cuda:
        return torch.nn.utils.get_total_norm(grads).double() ** 2
    runs = [torch.zeros(1, dtype=torch.float64)]
    for grad in grads:
        flat = grad.reshape(-1)
        whole = len(flat) - len(flat) % _RUN
        runs += [torch.linalg.vector_norm(flat[:whole].view(-1, _RUN), dim=1).double(), flat[whole:].double()]
    return torch.cat(runs).square().sum()


def _lowest_scale(parts: list[MegatronOptimizer]) -> bool:
    """True when fp16's loss scale is at its floor."""
    return any(float(part.get_loss_scale()) <= part.config.min_loss_scale for part in parts)


# Gradient norms behind the median of the spike test, and how many it takes before the test begins.
RECENT = 128
ENOUGH = 16


def not_finite(loss: float, grad_norm: float) -> str | None:
    """Reason why a step cannot be used whatever came before it, or None.

    loss: as in `Update`. grad_norm: before clipping.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the gradient norm is {grad_norm}"
    return None


class BadStepDetector:
    """Judges each step; what it remembers is in the TrainState, so that a resumed run judges alike.

    A spike is a gradient norm above `training.spike_factor` times the median of the last RECENT norms of steps that
    were used. It is the norm that is watched, not the loss: it shows a bad batch before the update, where the loss
    shows a bad update after it, when leaving out a step no longer helps.
    """

    def __init__(self, config: TrainingConfig, state: TrainState) -> None:
        self.config = config
        self.state = state

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Reason to skip the step of this mean loss (nats per token) and gradient norm, None when it is good.

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
        """Reason why a finite gradient norm is too large, or None."""
        factor, norms = self.config.spike_factor, self.state.recent_norms
        if factor == 0 or len(norms) < ENOUGH:
            return None
        usual = statistics.median(norms)
        if grad_norm <= factor * usual:
            return None
        return f"the gradient norm {grad_norm:.4g} is above training.spike_factor={factor:g} x the usual {usual:.4g}"

    @property
    def exhausted(self) -> bool:
        """True when the last step ends a row of training.max_bad_steps bad ones."""
        limit = self.config.max_bad_steps
        return 0 < limit <= self.state.bad_in_a_row

    def failure(self, step: int, reason: str) -> BadSteps:
        """Error of a run that ends after `step` (from 1), which was bad for `reason`."""
        return BadSteps(
            f"{self.state.bad_in_a_row} steps in a row up to step {step} were skipped ({reason}): lower optim.lr, or "
            f"look at the documents in bad_steps.jsonl; training.max_bad_steps={self.config.max_bad_steps} sets how "
            "many may be. Checkpoints from before are kept."
        )

    def failure_of_run(self, reason: str | None, validation_loss: float | None) -> BadSteps | None:
        """Error of a run that is of no use after its last step, or None.

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

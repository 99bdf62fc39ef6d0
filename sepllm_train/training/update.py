"""The end of a step: one reduction over all ranks, the judgement it allows, and the optimizer's update.

megatron-core's `optimizer.step()` clips and updates in one go. Here its parts are called one by one, because whether
the weights may be touched is decided by the loss and the gradient norm of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

# (mean loss, gradient norm) -> why the step must be skipped, or None.
Judge = Callable[[float, float], str | None]


@dataclass(frozen=True)
class Update:
    """What the reduction gave and what became of the step; the same on every rank.

    `loss`: mean over the batch, nats per token. `grad_norm`: before clipping, inf when fp16 gradients overflowed.
    `overflow`: the step was skipped and the loss scale lowered. `bad`: why the step was skipped otherwise, or None.
    `sums`: the caller's own numbers, summed over ranks.
    """

    loss: float
    grad_norm: float
    overflow: bool
    bad: str | None
    sums: list[float]


@torch.no_grad()
def update(optimizer: MegatronOptimizer, loss: Tensor, count: int, own: Sequence[float], judge: Judge) -> Update:
    """Take the optimizer's step unless `judge` objects; then weights and optimizer state stay as they are.

    `loss` f64 scalar: sum of the mean losses of the `count` micro-batches that this rank saw (0 and 0 off the last
    pipeline stage). `own`: numbers to be summed over all ranks on the way. Every rank calls it; it waits for the
    device once, as reading a gradient norm does.
    """
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    overflow = optimizer.prepare_grads()
    # Replicas that hold the same parameters hold the same gradients, so each square is summed as often.
    copies = dist.get_world_size() / dist.get_world_size(optimizer.get_grad_stats_parallel_group())
    square = torch.zeros_like(loss)
    if not overflow:
        grads = [grad for part in parts for grad in _norm_grads(part)]
        square += torch.nn.utils.get_total_norm(grads).to(square) ** 2 / copies
    # Summed over the world, not over the ranks of one replica: then all judge by the very same numbers.
    totals = torch.cat((torch.stack((loss, square)), torch.tensor([count, *own], dtype=loss.dtype, device=loss.device)))
    dist.all_reduce(totals)
    total, square_sum, seen, *sums = totals.tolist()
    mean = total / seen
    norm = math.inf if overflow else math.sqrt(square_sum) if square_sum >= 0 else math.nan
    # An overflow of fp16 is the loss scale's business as long as the scale can still fall.
    judged = not overflow or not math.isfinite(mean) or _lowest_scale(parts)
    bad = judge(mean, norm) if judged else None
    if bad is None and not overflow:
        for part in parts:
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


def _lowest_scale(parts: list[MegatronOptimizer]) -> bool:
    """Whether fp16's loss scale is at its floor."""
    return any(float(part.get_loss_scale()) <= part.config.min_loss_scale for part in parts)

"""Output layer and cross entropy without an fp32 copy of the logits, over chunks of tokens or all at once.

The plain way keeps logits, in half precision with a copy in fp32, of [S, B, vocabulary / TP]: the largest tensors of a
small model, read and written by one operation after another. Here two functions of the logits as they are do all of it
(`Pointwise.statistics` and `softmax_gradient`, one kernel each when compiled). Over several chunks the logits never
exist as a whole, and the backward pass multiplies the output layer once more for each; a single chunk keeps its logits
until then. megatron-core's `cross_entropy_loss_fusion` is not used: it keeps the whole fp32 logits too, and rounds
their gradient to bf16 also in fp32 and fp16 training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from sepllm_train.model.pointwise import Pointwise


@dataclass(frozen=True)
class OutputShard:
    """This rank's part of the output layer, and how much of it exists at once.

    `entries`: rows of the part, padding included; `vocabulary`: entries of the whole that are real; `chunk`: tokens, 0
    for all.
    """

    entries: int
    vocabulary: int
    chunk: int
    group: dist.ProcessGroup
    pointwise: Pointwise

    @property
    def first(self) -> int:
        """Number of the first entry in the whole vocabulary."""
        return get_pg_rank(self.group) * self.entries

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Logits [T, entries] of hidden [T, H], where there is no entry the lowest number: a difference of two of those
        is still a number."""
        logits = hidden @ weight.t()
        real = max(0, self.vocabulary - self.first)
        if real < self.entries:
            logits[:, real:] = torch.finfo(logits.dtype).min
        return logits

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Parts of `tokens` tokens that are of nearly one size and `chunk` at most."""
        size = -(-tokens // -(-tokens // (self.chunk or tokens)))
        return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))

    def keeps(self, tokens: int) -> bool:
        """True when the logits of `tokens` tokens are one chunk, which waits for the backward pass."""
        return not self.chunk or tokens <= self.chunk

    def own(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Row of this part for each label [T] (0 where another rank holds it), and whether it is held here."""
        rows = labels - self.first
        held = (rows >= 0) & (rows < self.entries)
        return rows.where(held, 0), held


def output_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, shard: OutputShard) -> Tensor:
    """Loss of each token in nats, fp32 [T].

    hidden [T, H] of all tokens, the same on each tensor-parallel rank; weight [entries, H] of this rank; labels i64
    [T]. The gradient of `hidden` is this rank's part of a sum over the tensor-parallel ranks.
    """
    return _OutputCrossEntropy.apply(hidden, weight, labels, shard)


class _OutputCrossEntropy(torch.autograd.Function):
    """log(sum of exp(l - m)) - (l of the label - m) with m the maximum of a token's logits l, softmax in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, shard: OutputShard) -> Tensor:
        """Two reductions over the tensor-parallel group, each of one number or two per token."""
        rows, held = shard.own(labels)
        kept: list[Tensor] = []
        maximum, total, of_label = torch.empty(3, len(labels), dtype=torch.float32, device=hidden.device).unbind()
        for part in shard.chunks(len(labels)):
            logits = shard.logits(hidden[part], weight)
            maximum[part], total[part] = shard.pointwise.statistics(logits)
            of_label[part] = logits.gather(1, rows[part, None])[:, 0].float()
            if shard.keeps(len(labels)):
                kept.append(logits)
            del logits  # before the next chunk's are made
        if get_pg_size(shard.group) > 1:
            own_maximum = maximum.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=shard.group)
            sums = torch.stack((total * (own_maximum - maximum).exp(), of_label.where(held, 0.0)))
            dist.all_reduce(sums, group=shard.group)
            total, of_label = sums.unbind()
        ctx.save_for_backward(hidden, weight, rows, held, maximum, total, of_label)
        # Not a saved tensor: those are held until the whole backward pass of this function is over.
        ctx.kept = kept
        ctx.shard = shard
        return total.log() - (of_label - maximum)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Logits again, chunk by chunk, unless they were kept; the weight's gradient is summed in fp32."""
        hidden, weight, rows, held, maximum, total, of_label = ctx.saved_tensors
        (gradient,) = gradients
        shard: OutputShard = ctx.shard
        kept: list[Tensor] = ctx.kept
        factor = gradient / total
        at_label = factor * (of_label - maximum).exp() - gradient
        of_hidden = torch.empty_like(hidden)
        of_weight: Tensor | None = None
        for part in shard.chunks(len(rows)):
            logits = kept.pop() if kept else shard.logits(hidden[part], weight)
            step = shard.pointwise.softmax_gradient(logits, maximum[part], factor[part])
            del logits
            index = rows[part, None]
            value = at_label[part, None].to(step.dtype).where(held[part, None], step.gather(1, index))
            step.scatter_(1, index, value)
            torch.mm(step, weight, out=of_hidden[part])
            if of_weight is None:
                of_weight = (step.t() @ hidden[part]).float()
            elif weight.dtype == torch.float32:
                of_weight.addmm_(step.t(), hidden[part])
            else:
                of_weight += step.t() @ hidden[part]
            del step
        assert of_weight is not None
        return of_hidden, of_weight.to(weight.dtype), None, None

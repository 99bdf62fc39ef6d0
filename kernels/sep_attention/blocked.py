"""Separator attention for CPU: query blocks over gathered keys, with a backward pass of its own.

A block of queries attends the special keys before its window and its local band; other keys are never touched.
Shape letters: B sequences, H query heads, N key-value heads, G = H / N, S tokens of which the last Q are queries, D
head dimension, C gathered special keys, R queries of a block, L keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sep_attention.layout import QueryBlock, RowLayout, block_layouts
from sep_attention.plan import FOREVER, AttentionPlan, is_traced

# Shorter blocks waste fewer pairs in the band, longer ones make fewer calls; flat between 96 and 128 for n = 64..256.
BLOCK = 128


class _Scratch:
    """Memory for one block's matrices, written anew by every block: fresh megabytes per block would cost page faults
    that take longer than the arithmetic."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.memory: dict[str, Tensor] = {}

    def matrix(self, name: str, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor; of two under one name only the latest is valid."""
        size = shape[0] * shape[1] * shape[2]
        if name not in self.memory or self.memory[name].numel() < size:
            self.memory[name] = torch.empty(size + size // 4, dtype=self.dtype)
        return self.memory[name][:size].view(shape)


class _Row:
    """One sequence in the dtype of the computation; queries [N, G, Q, D], keys and values [N, S, D]."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, layout: RowLayout, scale: float, scratch: _Scratch
    ) -> None:
        self.heads = (k.shape[0], q.shape[0] // k.shape[0])
        self.layout, self.scale, self.scratch = layout, scale, scratch
        # Blocks count positions; queries are those of the last ones.
        self.first_query = k.shape[1] - q.shape[1]
        self.queries = q.to(scratch.dtype).unflatten(0, self.heads)
        self.sink = None if sink is None else sink.to(scratch.dtype).view(*self.heads, 1)
        self.keys, self.values = k.to(scratch.dtype), v.to(scratch.dtype)
        self.far_keys, self.far_values = (x.index_select(1, layout.gathered) for x in (self.keys, self.values))
        # The sink is the logit of a null key: a last column whose key and value are zero.
        self.null = [] if sink is None else [torch.zeros(self.heads[0], 1, k.shape[-1], dtype=scratch.dtype)]

    def rows(self, tensor: Tensor, block: QueryBlock) -> Tensor:
        """Rows of [N, G, Q, D] that belong to a block, as [N, G * R, D]."""
        return tensor[:, :, self.slots(block)].reshape(self.heads[0], -1, tensor.shape[-1])

    def slots(self, block: QueryBlock) -> slice:
        """A block's queries among the Q that there are."""
        return slice(block.start - self.first_query, block.end - self.first_query)

    def read(self, name: str, far: Tensor, near: Tensor, block: QueryBlock) -> Tensor:
        """The block's keys or values, [N, L, D]."""
        parts = [*parts_of(block, far, near), *self.null]
        length = sum(part.shape[1] for part in parts)
        return torch.cat(parts, 1, out=self.scratch.matrix(name, near.shape[0], length, near.shape[2]))

    def softmax(self, queries: Tensor, keys: Tensor, block: QueryBlock) -> Tensor:
        """Softmax p of the block's masked scores, [N, G * R, L]."""
        shape = (*queries.shape[:2], keys.shape[1])
        scores = self.scratch.matrix("scores", *shape)
        scores.baddbmm_(queries, keys.transpose(1, 2), beta=0, alpha=self.scale)
        shaped = scores.view(*self.heads, block.end - block.start, -1)
        for column, bias in block.biases:
            shaped[..., column : column + bias.shape[1]].add_(bias)
        if self.sink is not None:
            shaped[..., -1] += self.sink
        return torch.softmax(scores, -1, out=self.scratch.matrix("p", *shape))

    def forward(self, out: Tensor) -> None:
        """Fills out [N, G, Q, D]."""
        for block in self.layout.blocks:
            queries = self.rows(self.queries, block)
            p = self.softmax(queries, self.read("keys", self.far_keys, self.keys, block), block)
            values = self.read("values", self.far_values, self.values, block)
            result = torch.bmm(p, values, out=self.scratch.matrix("result", *queries.shape))
            out[:, :, self.slots(block)] = result.view(*self.heads, -1, result.shape[-1])

    def backward(self, do: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, grad_sink: Tensor | None) -> None:
        """Fills grad_q [N, G, Q, D] and grad_k, grad_v [N, S, D]; adds to grad_sink [H] when there is one."""
        do = do.to(self.scratch.dtype)
        near_k, near_v = self.accumulator(grad_k), self.accumulator(grad_v)
        far_k, far_v = torch.zeros_like(self.far_keys), torch.zeros_like(self.far_values)
        for block in self.layout.blocks:
            queries, do_block = self.rows(self.queries, block), self.rows(do, block)
            keys = self.read("keys", self.far_keys, self.keys, block)
            values = self.read("values", self.far_values, self.values, block)
            p = self.softmax(queries, keys, block)
            ds = self.score_gradient(do_block, values, p)
            # Into one contiguous matrix first: torch multiplies a batch into slices of a larger one head by head.
            dv = torch.bmm(p.transpose(1, 2), do_block, out=self.scratch.matrix("dv", *values.shape))
            dk = self.scratch.matrix("dk", *keys.shape)
            dk.baddbmm_(ds.transpose(1, 2), queries, beta=0, alpha=self.scale)
            column = 0
            targets = zip(parts_of(block, far_k, near_k), parts_of(block, far_v, near_v), strict=True)
            for part_k, part_v in targets:
                columns = slice(column, column := column + part_k.shape[1])
                part_v += dv[:, columns]
                part_k += dk[:, columns]
            if grad_sink is not None:
                grad_sink += ds[..., -1].unflatten(1, (self.heads[1], -1)).sum(-1).flatten()
            result = self.scratch.matrix("result", *queries.shape).baddbmm_(ds, keys, beta=0, alpha=self.scale)
            grad_q[:, :, self.slots(block)] = result.view(*self.heads, -1, result.shape[-1])
        for near, far, target in ((near_k, far_k, grad_k), (near_v, far_v, grad_v)):
            # Every special key was gathered once: no duplicate index, so the sum has one fixed order.
            near.index_add_(1, self.layout.gathered, far)
            if near is not target:
                target.copy_(near)

    def score_gradient(self, do: Tensor, values: Tensor, p: Tensor) -> Tensor:
        """Gradient ds of the scores, [N, G * R, L]."""
        dp = torch.bmm(do, values.transpose(1, 2), out=self.scratch.matrix("scores", *p.shape))
        ds = self.scratch.matrix("ds", *p.shape)
        return torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=ds)

    def accumulator(self, target: Tensor) -> Tensor:
        """Zeros to sum a gradient in: the target itself unless its dtype is too narrow."""
        if target.dtype == self.scratch.dtype:
            return target.zero_()
        return torch.zeros(target.shape, dtype=self.scratch.dtype)


def parts_of(block: QueryBlock, far: Tensor, near: Tensor) -> Iterator[Tensor]:
    """Views of gathered [N, C, D] and whole [N, S, D] keys (values, gradients) that a block reads, in column order."""
    for first, last in block.far:
        yield far[:, first:last]
    yield near[:, block.local : block.end]


def _like(tensor: Tensor) -> Tensor:
    """An empty tensor of that shape whose axes lie in memory in the same order, without gaps."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    dense = tensor.new_empty([tensor.shape[axis] for axis in order])
    return dense.permute([order.index(axis) for axis in range(tensor.dim())])


def _output(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, layouts: list[RowLayout], scale: float) -> Tensor:
    out, scratch = _like(q), _Scratch(_wide(q.dtype))
    for index, layout in enumerate(layouts):
        row = _Row(q[index], k[index], v[index], sink, layout, scale, scratch)
        row.forward(out[index].unflatten(0, row.heads))
    return out


def _gradients(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, layouts: list[RowLayout], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sink."""
    grad_q, grad_k, grad_v = _like(q), _like(k), _like(v)
    scratch = _Scratch(_wide(q.dtype))
    grad_sink = None if sink is None else torch.zeros(sink.shape, dtype=scratch.dtype)
    for index, layout in enumerate(layouts):
        row = _Row(q[index], k[index], v[index], sink, layout, scale, scratch)
        do_row, target = (x[index].unflatten(0, row.heads) for x in (do, grad_q))
        row.backward(do_row, target, grad_k[index], grad_v[index], grad_sink)
    return grad_q, grad_k, grad_v, None if sink is None or grad_sink is None else grad_sink.to(sink.dtype)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, layouts: list[RowLayout], scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, sink)
        ctx.layouts, ctx.scale = layouts, scale
        return _output(q, k, v, sink, layouts, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink = ctx.saved_tensors
        return *_gradients(grads[0], q, k, v, sink, ctx.layouts, ctx.scale), None, None


# The same as registered ops, which torch.compile puts into its graph. They take the plan's tensors, since an op has no
# other arguments, and work out the layouts anew.
_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor tier, Tensor prefix, Tensor positions, "
    "Tensor? document_start, int window, int[] horizons, float scale"
)


def _layouts_of(
    q: Tensor,
    tier: Tensor,
    prefix: Tensor,
    positions: Tensor,
    document_start: Tensor | None,
    window: int,
    horizons: Sequence[int],
) -> list[RowLayout]:
    plan = AttentionPlan(tier, prefix, positions, document_start)
    return row_layouts(plan, window, horizons, q.shape[2])


def _run_forward(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *rest: Any) -> Tensor:
    return _output(q, k, v, sink, _layouts_of(q, *rest[:-1]), rest[-1])


def _run_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of the sink is empty where there is none."""
    dq, dk, dv, dsink = _gradients(do, q, k, v, sink, _layouts_of(q, *rest[:-1]), rest[-1])
    return dq, dk, dv, q.new_empty(0) if dsink is None else dsink


_forward = torch.library.custom_op(
    "sep_attention::blocked_forward", _run_forward, mutates_args=(), schema=f"({_SCHEMA}) -> Tensor"
)
_backward = torch.library.custom_op(
    "sep_attention::blocked_backward",
    _run_backward,
    mutates_args=(),
    schema=f"(Tensor do, {_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_forward.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return _like(q)


@_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v), q.new_empty(0) if sink is None else torch.empty_like(sink)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.settings = inputs[8:]


def _differentiate(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    sink = ctx.saved_tensors[3]
    *gradients, dsink = _backward(do, *ctx.saved_tensors, *ctx.settings)
    return *gradients, None if sink is None else dsink, *([None] * 7)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def row_layouts(
    plan: AttentionPlan, window: int, horizons: Sequence[int] | None, queries: int | None = None
) -> list[RowLayout]:
    """The layouts `blocked_attention` works with for the last `queries` positions (None: all of them).

    Deriving them ahead of the first layer is optional.
    """
    return block_layouts(plan, window, horizons, BLOCK, queries or plan.sequence_length)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    window: int,
    horizons: Sequence[int] | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """q [B, H, Q, D] on k, v [B, N, S, D] and sink [H] or None; returns [B, H, Q, D] laid out like q.

    Half types are computed in float32. Deterministic. Only q, k, v and sink are saved for the backward pass, which
    recomputes the softmax block by block. Under torch.compile it is one op of the graph.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if is_traced(q):
        horizons = [FOREVER] * plan.num_tiers if horizons is None else list(horizons)
        tensors = plan.tier, plan.prefix, plan.positions, plan.document_start
        return _forward(q, k, v, sink, *tensors, window, horizons, scale)
    return _Blocked.apply(q, k, v, sink, row_layouts(plan, window, horizons, q.shape[2]), scale)

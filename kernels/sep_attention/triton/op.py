"""The Triton backend: launches the kernels, as ops that autograd and torch.compile know.

Shape letters: B sequences, H query heads, N key-value heads, G = H / N, S tokens of which the last Q
are queries, D head dimension, T tiers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from sep_attention.plan import FOREVER, MAX_TIERS, AttentionPlan, effective_reach, is_traced
from sep_attention.triton.backward import ROW_PADDING, attention_backward_kv, attention_backward_q
from sep_attention.triton.forward import attention_forward
from sep_attention.triton.tuning import (
    FP_FUSION,
    HEAD_SIZES,
    Tile,
    dot_precision,
    interpreted,
    packed_heads,
    padded_head,
    select_tile,
)

OFFSET_LIMIT = 2**31


class _Layer(NamedTuple):
    """Inputs of a launch beside q, k and v."""

    tier: Tensor
    prefix: Tensor
    positions: Tensor
    document_start: Tensor | None
    document_end: Tensor | None
    sink: Tensor | None
    window: int
    horizons: Sequence[int]
    scale: float

    def scalars(self, q: Tensor, k: Tensor) -> tuple[int | float, ...]:
        """B, H, G, S, Q, window, four reaches, scale; what no query can use is cut at S."""
        batch, heads, queries, _ = q.shape
        length = k.shape[2]
        window = min(self.window, length)
        reaches = [min(max(horizon, window), length) for horizon in self.horizons]
        reaches += [window] * (MAX_TIERS - len(reaches))
        return batch, heads, heads // k.shape[1], length, queries, window, *reaches, self.scale

    def documents(self) -> tuple[Tensor, Tensor]:
        """Starts and ends, or stand-ins of their type that the kernels do not read."""
        if self.document_start is None or self.document_end is None:
            return self.positions, self.positions
        return self.document_start, self.document_end

    def launches(self, q: Tensor, k: Tensor, kernel: str) -> list[dict[str, Any]]:
        """Compile-time constants and compiler options of each launch of a kernel for these tensors."""
        precision = dot_precision(q.dtype)
        return _launches(
            kernel,
            q.shape[-1],
            precision,
            select_tile(kernel, q.shape[-1], precision, q.device),
            q.shape[1] // k.shape[1],
            len(self.horizons),
            min(self.horizons) < FOREVER,
            self.document_start is not None,
            self.sink is not None,
        )


@functools.cache
def _launches(
    kernel: str,
    head_size: int,
    precision: str,
    tile: Tile,
    groups: int,
    tiers: int,
    finite: bool,
    documents: bool,
    sink: bool,
) -> list[dict[str, Any]]:
    launches = kernel_constants(
        kernel,
        head_size,
        precision,
        tile,
        groups=groups,
        tiers=tiers,
        finite=finite,
        documents=documents,
        sink=sink,
    )
    return [constants | compiler_options(tile, constants) for constants in launches]


def kernel_constants(
    kernel: str,
    head_size: int,
    precision: str,
    tile: Tile,
    *,
    groups: int = 1,
    tiers: int = 1,
    finite: bool = False,
    documents: bool = False,
    sink: bool = False,
) -> list[dict[str, Any]]:
    """The constexpr arguments of each launch of a kernel ("forward", "backward_q" or "backward_kv").

    The defaults are the paper's pattern. `groups` is G; the number of query heads a tile packs follows from it.
    """
    constants = {
        "D": head_size,
        "PADDED": padded_head(head_size),
        "M": tile.queries,
        "N": tile.keys,
        "T": tiers,
        "DOCUMENTS": documents,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
    }
    if kernel != "backward_kv":
        return [constants | {"PACK": packed_heads(groups, tile), "FINITE": finite, "HAS_SINK": sink}]
    parts = [(True, False), (False, True)] if tile.split else [(True, True)]
    return [constants | {"WITH_K": with_k, "WITH_V": with_v} for with_k, with_v in parts]


def compiler_options(tile: Tile, constants: dict[str, Any]) -> dict[str, int]:
    """num_warps, num_stages, FP_FUSION and, where the tile limits them for the paper's pattern, maxnreg."""
    options = {"num_warps": tile.warps, "num_stages": tile.stages} | FP_FUSION
    # What the general masks keep beside the paper's would be spilled under its limit.
    general = constants["T"] > 1 or any(constants.get(name) for name in ("FINITE", "DOCUMENTS", "HAS_SINK"))
    return options if tile.registers is None or general else options | {"maxnreg": tile.registers}


def _query_grid(q: Tensor, options: dict[str, Any]) -> tuple[int, int]:
    """Blocks of queries of a head, and programs in all."""
    batch, heads, queries, _ = q.shape
    blocks = triton.cdiv(queries, options["M"] // options["PACK"])
    return blocks, blocks * batch * heads // options["PACK"]


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, where it is not."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


_PLAN_SCHEMA = (
    "Tensor tier, Tensor prefix, Tensor positions, Tensor? document_start, Tensor? document_end, Tensor? sink, "
    "int window, int[] horizons, float scale"
)


def _launch_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Output [B, H, Q, D] and the natural logarithm of the softmax denominators, f32 [B, H, Q]."""
    layer = _Layer(*rest)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    (options,) = layer.launches(q, k, "forward")
    _, programs = _query_grid(q, options)
    with _on_device(q):
        attention_forward[(programs,)](
            q,
            k,
            v,
            out,
            lse,
            layer.tier,
            layer.prefix,
            layer.positions,
            *layer.documents(),
            lse if layer.sink is None else layer.sink,
            *_strides(q, k, v, out),
            *layer.scalars(q, k),
            **options,
        )
    return out, lse


_forward = torch.library.custom_op(
    "sep_attention::triton_forward",
    _launch_forward,
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_PLAN_SCHEMA}) -> (Tensor, Tensor)",
)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _launch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the sink, the last of which is empty where there is none."""
    layer = _Layer(*rest)
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    _check_offsets(dout=dout)
    batch, heads, queries, _ = q.shape
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    # Rows past the last token are read but count for nothing; they only must not be NaN.
    make = torch.empty if queries % ROW_PADDING.value == 0 else torch.zeros
    rows = triton.cdiv(queries, ROW_PADDING.value) * ROW_PADDING.value
    statistics = make(2, batch, heads, rows, dtype=torch.float32, device=q.device)
    (options,) = layer.launches(q, k, "backward_q")
    blocks, programs = _query_grid(q, options)
    dsink = q.new_empty(0 if layer.sink is None else (batch, heads, blocks), dtype=torch.float32)
    scalars = layer.scalars(q, k)
    with _on_device(q):
        attention_backward_q[(programs,)](
            q,
            k,
            v,
            out,
            dout,
            dq,
            lse,
            statistics,
            layer.tier,
            layer.prefix,
            layer.positions,
            *layer.documents(),
            lse if layer.sink is None else layer.sink,
            lse if layer.sink is None else dsink,
            *_strides(q, k, v, out, dout, dq),
            *scalars,
            **options,
        )
        for options in layer.launches(q, k, "backward_kv"):
            tiles = triton.cdiv(k.shape[2], options["N"])
            attention_backward_kv[((2 * tiles + len(layer.horizons) - 1) * batch * k.shape[1],)](
                q,
                k,
                v,
                dout,
                dk,
                dv,
                statistics,
                layer.tier,
                layer.prefix,
                layer.positions,
                layer.documents()[1],
                *_strides(q, k, v, dout, dk, dv),
                *scalars,
                **options,
            )
    if layer.sink is not None:
        dsink = dsink.sum((0, 2)).to(layer.sink.dtype)
    return dq, dk, dv, dsink


_backward = torch.library.custom_op(
    "sep_attention::triton_backward",
    _launch_backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_PLAN_SCHEMA}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
)


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sink = _Layer(*rest).sink
    dsink = q.new_empty(0, dtype=torch.float32) if sink is None else torch.empty_like(sink)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dsink


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    layer = _Layer(*rest)
    ctx.save_for_backward(q, k, v, *output, *layer[:6])
    ctx.settings = layer[6:]


def _gradients(backward: Callable[..., tuple[Tensor, ...]], ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of what the forward op takes, by the registered op or by the launches themselves."""
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    dq, dk, dv, dsink = backward(dout, q, k, v, out, lse, *tensors, *ctx.settings)
    return dq, dk, dv, None, None, None, None, None, None if tensors[-1] is None else dsink, None, None, None


def _differentiate(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(_backward, ctx, dout)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


class _EagerAttention(torch.autograd.Function):
    """The same without torch.library, whose dispatch takes the host longer than everything else of a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _launch_forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(_launch_backward, ctx, dout)


def _attend(q: Tensor, k: Tensor, v: Tensor, layer: _Layer) -> Tensor:
    """Output of a call, differentiable."""
    if is_traced(q):
        return _forward(q, k, v, *layer)[0]
    return _EagerAttention.apply(q, k, v, *layer)


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of batch, head and row of each [B, heads, S, D], whose last axis is contiguous."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def document_end(plan: AttentionPlan) -> Tensor | None:
    """i32 [B, S], position after the last token of each token's document; None when the sequence is one document.

    Kept on the plan for the other layers. No host sync.
    """
    if plan.document_start is None:
        return None
    if "document_end" not in plan.derived:
        position = torch.arange(plan.sequence_length, device=plan.tier.device, dtype=torch.int32)
        position = position.expand(plan.tier.shape).contiguous()
        starts = plan.document_start.contiguous()
        plan.derived["document_end"] = torch.searchsorted(starts, position, right=True, out_int32=True)
    return plan.derived["document_end"]


def triton_attention(
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
    """q [B, H, Q, D] on k, v [B, N, S, D] and sink [H] or None; returns [B, H, Q, D] with its axes in q's order.

    bf16, fp16 or fp32 (multiplied as tf32 where torch's own matrix products are), summed in fp32; D one of
    HEAD_SIZES. Strides are taken as they come. Differentiable once in q, k, v and sink, deterministic, without a host
    sync. Raises ValueError, before any launch, for what the kernels cannot do and for a bad window or horizon.
    """
    effective_reach(plan, window, horizons)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    _check(q, k, v, scale)
    layer = _Layer(
        plan.tier,
        plan.prefix,
        plan.positions,
        plan.document_start,
        document_end(plan),
        sink,
        window,
        [FOREVER] * plan.num_tiers if horizons is None else list(horizons),
        scale,
    )
    return _attend(q, k, v, layer)


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    if not q.is_cuda and not interpreted():
        raise ValueError(f"backend 'triton' runs on a CUDA device, the tensors are on {q.device}")
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"backend 'triton' takes bfloat16, float16 or float32, got {q.dtype}")
    if q.dtype == torch.bfloat16 and interpreted():
        raise ValueError("Triton's interpreter multiplies bfloat16 wrongly: take float16 or float32")
    if q.shape[-1] not in HEAD_SIZES:
        sizes = ", ".join(map(str, HEAD_SIZES))
        raise ValueError(f"backend 'triton' has no configuration for head size {q.shape[-1]}, only for {sizes}")
    if not scale > 0:
        raise ValueError(f"backend 'triton' needs a scale above 0, got {scale}")
    _check_offsets(q=q, k=k, v=v)


def _check_offsets(**tensors: Tensor) -> None:
    """Raises ValueError for a head whose elements lie too far apart for the kernels' 32-bit offsets."""
    for name, tensor in tensors.items():
        length, stride = tensor.shape[2], tensor.stride(2)
        if length * stride >= OFFSET_LIMIT:
            raise ValueError(
                f"{name} spans {length} tokens times a stride of {stride} elements, backend 'triton' addresses "
                f"fewer than {OFFSET_LIMIT} within one head"
            )

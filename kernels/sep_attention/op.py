"""The public op: checks its input, picks a backend, runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sep_attention.blocked import blocked_attention
from sep_attention.dense import dense_attention, masked_attention
from sep_attention.plan import AttentionPlan, effective_reach
from sep_attention.reference import reference_attention
from sep_attention.triton.tuning import HEAD_SIZES, triton_runs_on

BACKENDS = ("reference", "triton", "blocked", "dense", "masked", "flex")
# Below this length one masked SDPA call beats the block loop on CPU (benchmarks/attention/cpu.py).
MASKED_UP_TO = 256


class BackendChoice(NamedTuple):
    """Name of a backend and, in a few words, why it was picked."""

    name: str
    reason: str


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names of the backends that can run on a device."""
    device = torch.device(device)
    missing = {"blocked"} if device.type != "cpu" else set()
    if not triton_runs_on(device):
        missing.add("triton")
    return tuple(name for name in BACKENDS if name not in missing)


def select_backend(
    backend: str = "auto",
    *,
    sequence_length: int,
    window: int,
    queries: int | None = None,
    device: torch.device | str = "cpu",
    separate_documents: bool = False,
    sink: bool = False,
    needs_grad: bool = True,
    head_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> BackendChoice:
    """Picks the backend of a layer, or checks the one asked for by name.

    `queries` counts the last positions that ask, None for all `sequence_length` of them. `auto` takes the library's
    dense kernel where the layer is plain causal attention over whole sequences, and else the fastest exact backend of
    the device that takes the head size and dtype, where these are given. Raises ValueError when the named backend is
    unknown or cannot do the job.
    """
    device = torch.device(device)
    full = window >= sequence_length and not separate_documents
    if backend != "auto":
        _check_named(backend, device, full, sink, needs_grad)
        return BackendChoice(backend, "asked for by name")
    # Library kernels are at their best on whole sequences.
    if full and not sink and queries in (None, sequence_length):
        return BackendChoice("dense", "plain causal attention")
    if device.type == "cpu":
        if sequence_length <= MASKED_UP_TO and not sink:
            return BackendChoice("masked", f"{sequence_length} tokens: one masked call beats a block loop")
        return BackendChoice("blocked", "fastest exact backend on CPU")
    if triton_runs_on(device) and head_size in (None, *HEAD_SIZES) and dtype != torch.float64:
        return BackendChoice("triton", "gathers the special keys: fastest exact backend on a GPU")
    if sink:
        return BackendChoice("reference", f"the only backend with a learned sink on {device.type}")
    return BackendChoice("flex", f"fastest exact backend here on {device.type}")


def _check_named(backend: str, device: torch.device, full: bool, sink: bool, needs_grad: bool) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: choose auto, {', '.join(BACKENDS)}")
    if backend == "triton" and not triton_runs_on(device):
        raise ValueError(f"backend 'triton' needs Triton and a CUDA device, the tensors are on {device}")
    if backend == "blocked" and device.type != "cpu":
        raise ValueError(f"backend 'blocked' runs on CPU only, the tensors are on {device.type}")
    if sink and backend in ("dense", "masked", "flex"):
        raise ValueError(f"backend {backend!r} has no learned sink: choose auto, triton, blocked or reference")
    if backend == "dense" and not full:
        raise ValueError("backend 'dense' is full causal attention: it needs window >= S and no separate documents")
    if backend == "flex" and device.type == "cpu" and needs_grad:
        raise ValueError("backend 'flex' has no backward pass on CPU: choose auto, blocked, masked or reference")


def sep_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    window: int,
    horizons: Sequence[int] | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Separator attention: key j is visible to query i iff both are in one document (when documents are separated)
    and `0 <= i - j < max(window, R(j))`, R(j) being the horizon of j's tier (0 for ordinary tokens).

    Args:
        q: [B, H, Q, D], the queries of the last Q <= S positions (of all of them in training without context
            parallelism); any strides with a contiguous last axis, such as a view of [Q, B, H, D].
        k, v: [B, N, S, D], H a multiple of N; same dtype and device as q.
        plan: of the B and S of k, on the same device.
        window: tokens in sight, the token itself included; S or more is full causal attention.
        horizons: R of tiers 1..T; FOREVER for all when None.
        sink: [H], learned logit of each head that joins the softmax denominator.
        scale: multiplies q @ k^T; D ** -0.5 when None.
        backend: "auto" or a name from `available_backends`.

    Returns [B, H, Q, D] in the dtype of q, its axes in memory in q's order where the backend is ours.
    Differentiable in q, k, v and sink. Raises ValueError for input that does not fit together, and for a backend
    that cannot do the job.
    """
    _check_tensors(q, k, v, plan, sink)
    effective_reach(plan, window, horizons)
    leaves = (q, k, v) if sink is None else (q, k, v, sink)
    choice = select_backend(
        backend,
        sequence_length=k.shape[2],
        queries=q.shape[2],
        window=window,
        device=q.device,
        separate_documents=plan.document_start is not None,
        sink=sink is not None,
        needs_grad=torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves),
        head_size=q.shape[-1],
        dtype=q.dtype,
    )
    if choice.name == "dense":
        return dense_attention(q, k, v, scale=scale)
    if choice.name == "masked":
        return masked_attention(q, k, v, plan, window=window, horizons=horizons, scale=scale)
    if choice.name == "flex":
        # Imported on use: it pulls in the compiler, which takes longer than the rest of this package together.
        from sep_attention.flex import flex_sep_attention

        return flex_sep_attention(q, k, v, plan, window=window, horizons=horizons, scale=scale)
    if choice.name == "triton":
        # Imported on use: Triton is optional.
        from sep_attention.triton.op import triton_attention

        return triton_attention(q, k, v, plan, window=window, horizons=horizons, sink=sink, scale=scale)
    run = blocked_attention if choice.name == "blocked" else reference_attention
    return run(q, k, v, plan, window=window, horizons=horizons, sink=sink, scale=scale)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, sink: Tensor | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, head dimension], got {list(tensor.shape)}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}'s head dimension must be contiguous, its stride is {tensor.stride(-1)}, not 1")
        if tensor.dtype != q.dtype or not tensor.is_floating_point():
            raise ValueError(f"q, k and v must share one floating dtype, got {q.dtype} and, for {name}, {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"q is on {q.device} but {name} is on {tensor.device}")
    batch, heads, queries, width = q.shape
    length = k.shape[2]
    if k.shape != v.shape:
        raise ValueError(f"k is {list(k.shape)} but v is {list(v.shape)}")
    if (k.shape[0], k.shape[3]) != (batch, width):
        raise ValueError(f"q is {list(q.shape)} but k is {list(k.shape)}: batch and head dimension must agree")
    if not 1 <= queries <= length:
        raise ValueError(f"{queries} queries but {length} keys: queries are those of the last positions, at least one")
    if k.shape[1] < 1 or heads % k.shape[1]:
        raise ValueError(f"{heads} query heads are not a multiple of {k.shape[1]} key-value heads")
    if (plan.batch_size, plan.sequence_length) != (batch, length):
        raise ValueError(
            f"the plan is for {plan.batch_size} sequences of {plan.sequence_length} tokens, k holds {batch} of {length}"
        )
    if plan.tier.device != q.device:
        raise ValueError(f"the plan is on {plan.tier.device} but q is on {q.device}")
    if sink is not None:
        if list(sink.shape) != [heads]:
            raise ValueError(f"sink must be [{heads}], one logit per query head, got {list(sink.shape)}")
        if sink.device != q.device:
            raise ValueError(f"sink is on {sink.device} but q is on {q.device}")

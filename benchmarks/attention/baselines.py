"""The attention kernels that are timed beside ours, behind one call.

All take q [B, H, S, D] and k, v [B, N, S, D], views of [B, S, heads, D], and give [B, H, S, D]. Dense ones compute
full causal attention, sparse ones the paper's pattern. A factory raises when its kernel cannot run here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sep_attention import AttentionPlan, sep_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention.block_masks import gathered_mask, plan_mask

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS = "ours"


class Baseline(NamedTuple):
    """A kernel: whether it computes the sparse pattern, and what makes it for a plan and a window."""

    sparse: bool
    make: Callable[[AttentionPlan, int], Attention]


def ours(plan: AttentionPlan, window: int) -> Attention:
    """The Triton backend through the public op; full causal attention where the window covers the sequence."""
    return lambda q, k, v: sep_attention(q, k, v, plan, window=window, backend="triton")


def _sdpa(backend: SDPBackend) -> Callable[[AttentionPlan, int], Attention]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return lambda plan, window: attend


def _flash_attn(module: str) -> Callable[[AttentionPlan, int], Attention]:
    def make(plan: AttentionPlan, window: int) -> Attention:
        function = importlib.import_module(module).flash_attn_func

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result: Any = function(*(tensor.transpose(1, 2) for tensor in (q, k, v)), causal=True)
            # Versions 3 and 4 may give the softmax statistics too.
            return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

        return attend

    return make


def flex_masked(plan: AttentionPlan, window: int) -> Attention:
    """FlexAttention with the same mask over the keys as they are."""
    mask = plan_mask(plan, window)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return _compiled(attend, plan)


def flex_gathered(plan: AttentionPlan, window: int) -> Attention:
    """FlexAttention over [gathered special keys | all keys]; gathering them is part of the call."""
    mask, position = gathered_mask(plan, window)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slots = position[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        keys, values = (torch.cat((tensor.gather(2, slots), tensor), 2) for tensor in (k, v))
        return flex_attention(q, keys, values, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return _compiled(attend, plan)


def _compiled(attend: Attention, plan: AttentionPlan) -> Attention:
    if plan.tier.is_cuda:
        return torch.compile(attend, dynamic=False)

    def uncompiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.requires_grad and torch.is_grad_enabled():
            # What torch itself lacks: the benchmark records the sentence in the place of a figure.
            raise NotImplementedError("FlexAttention has no backward pass on CPU")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")
            return attend(q, k, v)

    return uncompiled


def baselines_of(device: torch.device) -> dict[str, Baseline]:
    """Kernels to time on a device, ours first."""
    sparse = {
        OURS: Baseline(True, ours),
        "flex": Baseline(True, flex_masked),
        "flex gathered": Baseline(True, flex_gathered),
    }
    if device.type != "cuda":
        return sparse | {"sdpa": Baseline(False, _sdpa(SDPBackend.MATH))}
    return sparse | {
        "cudnn": Baseline(False, _sdpa(SDPBackend.CUDNN_ATTENTION)),
        "flash sdpa": Baseline(False, _sdpa(SDPBackend.FLASH_ATTENTION)),
        "flash-attn 2": Baseline(False, _flash_attn("flash_attn")),
        "flash-attn 3": Baseline(False, _flash_attn("flash_attn_interface")),
        "flash-attn 4": Baseline(False, _flash_attn("flash_attn.cute")),
    }


def installed_versions() -> dict[str, str]:
    """Versions of the optional packages among the baselines, where they are installed."""
    versions = {}
    for name in ("flash-attn", "flash-attn-3", "flash-attn-4"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions

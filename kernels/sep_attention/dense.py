"""Library kernels: the best dense causal attention at hand, and SDPA under a bool mask for short sequences."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from sep_attention.plan import AttentionPlan, effective_reach
from sep_attention.reference import visible_mask


@cache
def flash_attn_installed() -> bool:
    """True when the optional flash-attn package can be imported."""
    return importlib.util.find_spec("flash_attn") is not None


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Full causal attention of q [B, H, Q, D] on k, v [B, N, S, D]; returns [B, H, Q, D].

    The queries are those of the last Q positions. On a GPU in half precision: flash-attn when installed, else cuDNN's
    or the built-in flash kernel. Elsewhere, and where Q < S without flash-attn, whatever
    `scaled_dot_product_attention` picks.
    """
    half_on_gpu = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    if half_on_gpu and flash_attn_installed():
        flash_attn_func = importlib.import_module("flash_attn").flash_attn_func
        deterministic = torch.are_deterministic_algorithms_enabled()
        rows = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return flash_attn_func(*rows, softmax_scale=scale, causal=True, deterministic=deterministic).transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    if q.shape[2] != k.shape[2]:
        # is_causal would align the mask to the first key.
        mask = causal_lower_right(q.shape[2], k.shape[2])
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    if half_on_gpu and not torch.are_deterministic_algorithms_enabled():
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(order, set_priority=True):
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    window: int,
    horizons: Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """SDPA under the plan's dense mask: exact, S x S of memory, for short S. Shapes as in `dense_attention`.

    The mask is kept on the plan, so that all layers with the same window share one.
    """
    key = ("mask", q.shape[2], window, *effective_reach(plan, window, horizons))
    if key not in plan.derived:
        plan.derived[key] = visible_mask(plan, window, horizons)[:, None, -q.shape[2] :]
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, attn_mask=plan.derived[key], scale=scale, enable_gqa=grouped)

"""Triton's version of the fixed-size key-value cache: launches the kernels, without a host sync or an allocation.

Shape letters: L layers, B rows, H query heads, G key-value heads, C slots, D features of a head, R rotary features, P
parts of a row.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from sep_attention.decode.cache import PART, DecodeCache
from sep_attention.decode.kernels import advance_kernel, attend_kernel, combine_kernel, move_kernel, write_kernel
from sep_attention.triton.tuning import FP_FUSION, dot_precision, interpreted, padded_head


@functools.cache
def kernel_options(
    kernel: str, capacity: int, head_size: int, rotary: int | None, groups: int, precision: str
) -> dict[str, Any]:
    """Compile-time constants and compiler options of a kernel ("advance", "move", "write", "attend", "combine").

    rotary is R, None where keys keep their position; groups is H / G; precision is that of `dot_precision`.
    """
    size = triton.next_power_of_2(capacity)
    padded = max(16, padded_head(head_size))
    head: dict[str, Any] = {"D": head_size, "PADDED": padded} | FP_FUSION
    if kernel == "advance":
        return {"SIZE": size, "num_warps": min(16, max(4, size // 512))} | FP_FUSION
    if kernel == "move":
        turned = {"R": rotary or 0, "TURNED": rotary is not None}
        return head | turned | {"N": max(1, 4096 // padded), "num_warps": 4}
    if kernel == "write":
        return head | {"TURNED": rotary is not None, "num_warps": 1}
    if kernel == "combine":
        return head | {"SIZE": triton.next_power_of_2(-(-capacity // PART)), "num_warps": 4}
    return head | {
        "GROUP": groups,
        "M": max(16, triton.next_power_of_2(groups)),
        "N": max(16, min(64, (8192 if precision == "half" else 4096) // padded)),
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "num_warps": 4,
        "num_stages": 3,
    }


def _options(cache: DecodeCache, kernel: str) -> dict[str, Any]:
    rotary = None if cache.turn_cos is None else 2 * cache.turn_cos.shape[-1]
    groups = cache.heads // cache.keys.shape[2]
    width, precision = cache.keys.shape[4], dot_precision(cache.keys.dtype)
    return kernel_options(kernel, cache.capacity, width, rotary, groups, precision)


def launch_advance(cache: DecodeCache, ids: Tensor, reach_of_token: Tensor) -> None:
    """`decode.advance` by two kernels: the plan of each row, and the move of every layer's and head's keys."""
    layers, batch, kv_heads, slots, _ = cache.keys.shape
    with torch.cuda.device_of(ids):
        advance_kernel[(batch,)](
            ids,
            reach_of_token,
            cache.length,
            cache.seen,
            cache.reach,
            cache.position,
            cache.arrival,
            cache.source,
            cache.moved,
            slots,
            cache.initial,
            cache.separators,
            cache.window,
            **_options(cache, "advance"),
        )
        move_kernel[(layers * batch * kv_heads,)](
            cache.keys,
            cache.values,
            _arrived(cache),
            cache.arrival,
            cache.source,
            cache.moved,
            *_turns(cache),
            batch,
            kv_heads,
            slots,
            **_options(cache, "move"),
        )


def launch_write(cache: DecodeCache, layer: int, key: Tensor, value: Tensor) -> None:
    """`decode.write` by one kernel."""
    _, batch, kv_heads, slots, _ = cache.keys.shape
    with torch.cuda.device_of(key):
        write_kernel[(batch * kv_heads,)](
            key,
            value,
            cache.keys,
            cache.values,
            _arrived(cache),
            cache.length,
            *key.stride()[:2],
            *value.stride()[:2],
            layer,
            batch,
            kv_heads,
            slots,
            **_options(cache, "write"),
        )


def launch_attend(cache: DecodeCache, layer: int, query: Tensor, scale: float, out: Tensor) -> None:
    """`decode.attend` by one kernel, and where rows are cut into parts by one more that puts them together."""
    if query.dtype == torch.bfloat16 and interpreted():
        raise ValueError("Triton's interpreter multiplies bfloat16 wrongly: take float16 or float32")
    _, batch, kv_heads, slots, _ = cache.keys.shape
    parts = cache.partial.shape[2]
    part = slots if parts == 1 else PART
    with torch.cuda.device_of(query):
        attend_kernel[(batch * kv_heads * parts,)](
            query,
            cache.keys,
            cache.values,
            cache.length,
            out,
            cache.partial,
            cache.partial_lse,
            *query.stride()[:2],
            *out.stride()[:2],
            layer,
            batch,
            kv_heads,
            slots,
            parts,
            part,
            float(scale),
            WHOLE=parts == 1,
            **_options(cache, "attend"),
        )
        if parts > 1:
            combine_kernel[(batch * cache.heads,)](
                cache.partial,
                cache.partial_lse,
                cache.length,
                out,
                *out.stride()[:2],
                cache.heads,
                parts,
                part,
                **_options(cache, "combine"),
            )


def _arrived(cache: DecodeCache) -> Tensor:
    """Keys as they arrived, or a stand-in that the kernels do not touch."""
    return cache.keys if cache.arrived is None else cache.arrived


def _turns(cache: DecodeCache) -> tuple[Tensor, Tensor]:
    """Cosines and sines, or stand-ins that the kernels do not read."""
    if cache.turn_cos is None or cache.turn_sin is None:
        return cache.partial, cache.partial
    return cache.turn_cos, cache.turn_sin

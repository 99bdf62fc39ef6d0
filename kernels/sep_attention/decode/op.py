"""Decoding with a key-value cache of fixed size: the bookkeeping of a step, a layer's write and its attention.

A row's keys fill its first slots, and the number of a slot is its key's position inside the cache. Before a full row
takes its next token it is compacted to its initial tokens, newest separators and local window. Triton's version never
waits for the device and allocates nothing, so that a step can be captured in a CUDA graph; the one in plain torch, for
every other device, is what it is held to.

Shape letters: L layers, B rows (sequences), H query heads, G key-value heads (H a multiple of G), C slots, D features
of a head of which the first R are rotary; V vocabulary entries, N kept keys of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sep_attention.decode.cache import DecodeCache
from sep_attention.plan import FOREVER
from sep_attention.triton.tuning import TRITON_INSTALLED


@torch.no_grad()
def advance(cache: DecodeCache, ids: Tensor, reach_of_token: Tensor) -> None:
    """Makes room where a row is full and appends a token to each row: once a step, before the layers' writes.

    A full row keeps, in their order, its `initial` first slots, its last `window` - 1 and, of those between, the
    newest `separators` that are separators for the next token, their reach being above its distance. The kept keys and
    values of all layers move to the first slots.

    Args:
        ids: i64 [B], the tokens, from 0 to V - 1.
        reach_of_token: i32 [V], `reach` of each vocabulary entry.

    The new tokens are then in slot `length` - 1, at position `seen` - 1 of their row. Raises ValueError for other
    shapes or types.
    """
    cache.check("ids", ids, (cache.keys.shape[1],), torch.int64)
    cache.check("reach_of_token", reach_of_token, reach_of_token.shape[:1], torch.int32)
    if _on_triton(cache):
        from sep_attention.decode.launch import launch_advance

        launch_advance(cache, ids, reach_of_token)
        return
    cache.moved.zero_()
    if int(cache.length.max()) == cache.capacity:
        for number in (cache.length == cache.capacity).nonzero().flatten().tolist():
            _compact(cache, number)
    slot = cache.length.long()[:, None]
    cache.reach.scatter_(1, slot, reach_of_token[ids][:, None])
    cache.position.scatter_(1, slot, cache.seen[:, None])
    cache.arrival.scatter_(1, slot, cache.length[:, None])
    cache.length.add_(1)
    cache.seen.add_(1)


def _compact(cache: DecodeCache, row: int) -> None:
    """Moves what a full row keeps to its first slots, in all layers."""
    slot = torch.arange(cache.capacity, device=cache.keys.device)
    always = (slot < cache.initial) | (slot > cache.capacity - cache.window)
    reach, distance = cache.reach[row], cache.seen[row] - cache.position[row]
    separator = ~always & ((reach > distance) | (reach >= FOREVER))
    newer = separator.sum() - separator.cumsum(0)
    kept = (always | (separator & (newer < cache.separators))).nonzero().flatten()
    count = len(kept)
    cache.source[row, :count] = kept.int()
    cache.moved[row] = cache.length[row] = count
    for known in (cache.reach, cache.position, cache.arrival):
        known[row, :count] = known[row, kept]
    for stored in (cache.keys, cache.values, cache.arrived):
        if stored is not None:
            stored[:, row, :, :count] = stored[:, row, :, kept]
    if cache.arrived is not None and cache.turn_cos is not None and cache.turn_sin is not None:
        back = cache.arrival[row, :count] - slot[:count]
        turned = _turn_back(cache.arrived[:, row, :, :count], cache.turn_cos[back], cache.turn_sin[back])
        cache.keys[:, row, :, :count] = turned


def _turn_back(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys [L, G, N, D] rotated backwards by the angles of which [N, R / 2] are cosines and sines; in float32."""
    half = cos.shape[-1]
    first, second, rest = keys.float().split((half, half, keys.shape[-1] - 2 * half), -1)
    turned = torch.cat((first * cos + second * sin, second * cos - first * sin, rest), -1)
    return turned.to(keys.dtype)


@torch.no_grad()
def write(cache: DecodeCache, layer: int, key: Tensor, value: Tensor) -> None:
    """Puts the new token's key and value of a layer, [B, G, D], in slot `length` - 1 of each row.

    With `arrived` the key must be rotated to that slot. Rows of length 0 take nothing. Raises ValueError for other
    shapes or types.
    """
    _, batch, kv_heads, _, width = cache.keys.shape
    _check_layer(cache, layer)
    cache.check("key", key, (batch, kv_heads, width), cache.keys.dtype)
    cache.check("value", value, (batch, kv_heads, width), cache.keys.dtype)
    if _on_triton(cache):
        from sep_attention.decode.launch import launch_write

        launch_write(cache, layer, key, value)
        return
    row = cache.length.nonzero().flatten()
    slot = cache.length[row].long() - 1
    for stored, new in ((cache.keys, key), (cache.values, value), (cache.arrived, key)):
        if stored is not None:
            stored[layer, row, :, slot] = new[row]


@torch.no_grad()
def attend(cache: DecodeCache, layer: int, query: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """Attention of one query per row to a layer's slots 0 .. `length` - 1, summed in float32.

    Args:
        query: [B, H, D], in the dtype of the cache.
        scale: multiplies query @ keys^T.
        out: [B, H, D] to write to; a new tensor when None.

    Returns out, zeros in rows of length 0. Deterministic; on a GPU a row's result does not depend on the others.
    Raises ValueError for other shapes or types.
    """
    _, batch, kv_heads, slots, width = cache.keys.shape
    shape = batch, cache.heads, width
    _check_layer(cache, layer)
    cache.check("query", query, shape, cache.keys.dtype)
    if out is None:
        out = torch.empty(shape, dtype=query.dtype, device=query.device)
    cache.check("out", out, shape, cache.keys.dtype)
    if _on_triton(cache):
        from sep_attention.decode.launch import launch_attend

        launch_attend(cache, layer, query, scale, out)
        return out
    filled = torch.arange(slots, device=query.device) < cache.length[:, None]
    # The query heads of a key-value head, [B, G, H / G, D], in the place of positions.
    result = scaled_dot_product_attention(
        query.reshape(batch, kv_heads, -1, width),
        cache.keys[layer],
        cache.values[layer],
        attn_mask=filled[:, None, None],
        scale=scale,
    )
    return out.copy_(result.reshape(shape))


def _on_triton(cache: DecodeCache) -> bool:
    return TRITON_INSTALLED and cache.keys.is_cuda


def _check_layer(cache: DecodeCache, layer: int) -> None:
    if not 0 <= layer < len(cache.keys):
        raise ValueError(f"layer {layer} is not one of the cache's {len(cache.keys)}, which count from 0")

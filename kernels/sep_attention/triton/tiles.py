"""Shared by the kernels: the keys that a block of queries reads, tile by tile, and their mask.

A key is in sight of the queries `key .. key + span - 1`, its span being the reach of its tier cut at the end of its
document. One unsigned comparison, `query - key < span`, therefore holds the whole mask; a span of 0 hides a key.
Shape letters: M query rows of a tile, N key rows of a tile, D head dimension (padded to a power of two).
"""

# The compiler types the arguments of kernels, anew for each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The score of a key out of sight, and the maximum of a row that has seen none. Finite: infinities subtract to NaN.
MASKED = tl.constexpr(-1.0e30)


@triton.jit
def load_rows(base, offsets, columns, D: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a matrix at element offsets [R], with zeros past column D; [R, PADDED]."""
    pointers = base + offsets[:, None] + columns[None, :]
    if D == PADDED:
        return tl.load(pointers)
    return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)


@triton.jit
def store_rows(base, offsets, columns, values, row_mask, D: tl.constexpr, PADDED: tl.constexpr):
    """Writes values [R, PADDED] to the first D columns of the rows at element offsets [R] where row_mask is on."""
    mask = row_mask[:, None]
    if D != PADDED:
        mask = mask & (columns < D)[None, :]
    tl.store(base + offsets[:, None] + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def reach_of(tier, reaches, T: tl.constexpr):
    """Number of queries, from its own position on, that see a key of this tier (a number or a tensor of them).

    reaches holds those of tiers 0 (the window), 1, 2, 3 and 4.
    """
    reach = tl.where(tier == 0, reaches[0], reaches[1])
    if T > 1:
        reach = tl.where(tier == 2, reaches[2], reach)
    if T > 2:
        reach = tl.where(tier == 3, reaches[3], reach)
    if T > 3:
        reach = tl.where(tier == 4, reaches[4], reach)
    return reach


@triton.jit
def local_start(first_query, first_document, window):
    """First key of the local band of a block of queries, on a multiple of 16."""
    return tl.maximum(first_query - window + 1, first_document) // 16 * 16


@triton.jit
def compact_range(
    prefix,
    first_query,
    last_query,
    local,
    first_document,
    last_document,
    reach,
    FINITE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """Of a tier's sorted keys those before the local band that some query of the block sees: low .. high - 1.

    Those from `full` on are in sight of all its queries. Without finite horizons and documents both ends start at 0.
    """
    high = tl.load(prefix + local)
    low = high * 0
    full = high * 0
    if FINITE or DOCUMENTS:
        low = tl.minimum(tl.load(prefix + tl.maximum(first_query - reach + 1, first_document)), high)
        full = tl.load(prefix + tl.maximum(last_query - reach + 1, last_document))
    return low, full, high


@triton.jit
def key_slots(index, num_compact, low, high, local, S, N: tl.constexpr):
    """Tile `index` of a block of queries: first `num_compact` tiles of gathered keys, then the local band.

    Returns slots [N] in the tier's sorted keys or, in the band, in the sequence; and their validity [N].
    """
    is_local = index >= num_compact
    first = tl.where(is_local, local + (index - num_compact) * N, low + index * N)
    slot = first + tl.arange(0, N)
    return slot, slot < tl.where(is_local, S, high)


@triton.jit
def key_positions(positions, slot, valid, is_local):
    """Positions [N] of the keys at some slots, gathered or in the band; 0 where a slot is not valid."""
    gathered = tl.load(positions + slot, mask=valid & (is_local == 0), other=0)
    return tl.where(is_local & valid, slot, gathered)


@triton.jit
def key_spans(tiers, document_end, key, valid, reaches, T: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Spans [N] of the keys at some positions; 0 where there is no key."""
    span = reach_of(tl.load(tiers + key, mask=valid, other=0).to(tl.int32), reaches, T)
    if DOCUMENTS:
        span = tl.minimum(span, tl.load(document_end + key, mask=valid, other=0) - key)
    return tl.where(valid, span, 0)


@triton.jit
def in_sight(query, key, span):
    """Mask of the keys that each query sees, by broadcasting; keys with a span of 0 are hidden."""
    return (query - key).to(tl.uint32, bitcast=True) < span.to(tl.uint32, bitcast=True)

"""Kernels of the fixed-size key-value cache: the plan of a step, the move of what is kept, write and attention.

Shape letters: L layers, B rows, H query heads, G key-value heads, C slots, D features of a head (padded to a power of
two), R rotary features, P parts of a row; M rows of a tile of queries, N slots of a tile of keys.
"""

# The compiler types the arguments of kernels, anew for each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from sep_attention.plan import FOREVER
from sep_attention.triton.tiles import LOG2E, MASKED

ENDLESS = tl.constexpr(FOREVER)
# Values that differ between caches, layers and steps: the compiled kernels must not depend on them.
VARYING = ["layer", "B", "H", "G", "C", "initial", "separators", "window", "parts", "part"]


@triton.jit(do_not_specialize=VARYING)
def advance_kernel(
    IDS,
    REACH_OF_TOKEN,
    LENGTH,
    SEEN,
    REACH,
    POSITION,
    ARRIVAL,
    SOURCE,
    MOVED,
    C,
    initial,
    separators,
    window,
    SIZE: tl.constexpr,
):
    """One program for each row, SIZE >= C: what a full row keeps, and the new token's entries."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(LENGTH + row)
    seen = tl.load(SEEN + row)
    token_reach = tl.load(REACH_OF_TOKEN + tl.load(IDS + row))
    first = row * C
    count = length
    moved = length * 0
    # Every thread has read the row's numbers, and in a full row its slots, before one of them writes new ones.
    tl.debug_barrier()
    if length == C:
        slot = tl.arange(0, SIZE)
        inside = slot < C
        reach = tl.load(REACH + first + slot, mask=inside, other=0)
        position = tl.load(POSITION + first + slot, mask=inside, other=0)
        arrival = tl.load(ARRIVAL + first + slot, mask=inside, other=0)
        always = inside & ((slot < initial) | (slot > C - window))
        lasting = (reach > seen - position) | (reach >= ENDLESS)
        separator = (inside & (always == 0) & lasting).to(tl.int32)
        newer = tl.sum(separator, 0) - tl.cumsum(separator, 0)
        keep = (always | ((separator > 0) & (newer < separators))).to(tl.int32)
        target = first + tl.cumsum(keep, 0) - keep
        count = tl.sum(keep, 0)
        moved = count
        tl.debug_barrier()
        tl.store(REACH + target, reach, mask=keep > 0)
        tl.store(POSITION + target, position, mask=keep > 0)
        tl.store(ARRIVAL + target, arrival, mask=keep > 0)
        tl.store(SOURCE + target, slot, mask=keep > 0)
    tl.store(REACH + first + count, token_reach)
    tl.store(POSITION + first + count, seen)
    tl.store(ARRIVAL + first + count, count)
    tl.store(LENGTH + row, count + 1)
    tl.store(SEEN + row, seen + 1)
    tl.store(MOVED + row, moved)


@triton.jit(do_not_specialize=VARYING)
def move_kernel(
    KEYS,
    VALUES,
    ARRIVED,
    ARRIVAL,
    SOURCE,
    MOVED,
    TURN_COS,
    TURN_SIN,
    B,
    G,
    C,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    R: tl.constexpr,
    TURNED: tl.constexpr,
    N: tl.constexpr,
):
    """One program for each layer, row and key-value head: moves what the row's compaction kept, in place.

    Slots are filled in ascending tiles, and SOURCE is ascending with SOURCE[slot] >= slot. A tile [first, first + N)
    therefore overwrites no source of a later tile, which are all >= first + N; of its own sources it may, so all of
    them are read before the first is written.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // G % B
    count = tl.load(MOVED + row)
    head = program * C * D
    column = tl.arange(0, PADDED)
    HALF: tl.constexpr = R // 2
    for start in tl.range(0, count, N):
        slot = start + tl.arange(0, N)
        filled = slot < count
        source = tl.load(SOURCE + row * C + slot, mask=filled, other=0)
        mask = filled[:, None] & (column < D)[None, :]
        old = head + source[:, None] * D
        new = head + slot[:, None] * D + column[None, :]
        values = tl.load(VALUES + old + column[None, :], mask=mask)  # [N, PADDED]
        if TURNED:
            back = tl.load(ARRIVAL + row * C + slot, mask=filled, other=0) - slot
            rotary = column < R
            partner = tl.where(rotary, tl.where(column < HALF, column + HALF, column - HALF), column)
            keys = tl.load(ARRIVED + old + column[None, :], mask=mask)
            others = tl.load(ARRIVED + old + partner[None, :], mask=mask)
            turn = back[:, None] * HALF + (column % HALF)[None, :]
            turning = filled[:, None] & rotary[None, :]
            cos = tl.load(TURN_COS + turn, mask=turning, other=1.0)
            sin = tl.load(TURN_SIN + turn, mask=turning, other=0.0)
            sin = tl.where((column < HALF)[None, :], sin, -sin)
            turned = keys.to(tl.float32) * cos + others.to(tl.float32) * sin
            tl.debug_barrier()
            tl.store(ARRIVED + new, keys, mask=mask)
            tl.store(KEYS + new, turned.to(KEYS.dtype.element_ty), mask=mask)
        else:
            keys = tl.load(KEYS + old + column[None, :], mask=mask)
            tl.debug_barrier()
            tl.store(KEYS + new, keys, mask=mask)
        tl.store(VALUES + new, values, mask=mask)


@triton.jit(do_not_specialize=VARYING)
def write_kernel(
    KEY,
    VALUE,
    KEYS,
    VALUES,
    ARRIVED,
    LENGTH,
    key_batch,
    key_head,
    value_batch,
    value_head,
    layer,
    B,
    G,
    C,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    TURNED: tl.constexpr,
):
    """One program for each row and key-value head: the new token's key and value."""
    row = (tl.program_id(0) // G).to(tl.int64)
    head = (tl.program_id(0) % G).to(tl.int64)
    length = tl.load(LENGTH + row)
    column = tl.arange(0, PADDED)
    mask = (column < D) & (length > 0)
    target = (((layer * B + row) * G + head) * C + length - 1) * D + column
    key = tl.load(KEY + row * key_batch + head * key_head + column, mask=mask)
    value = tl.load(VALUE + row * value_batch + head * value_head + column, mask=mask)
    tl.store(KEYS + target, key, mask=mask)
    tl.store(VALUES + target, value, mask=mask)
    if TURNED:
        tl.store(ARRIVED + target, key, mask=mask)


@triton.jit(do_not_specialize=VARYING)
def attend_kernel(
    Q,
    KEYS,
    VALUES,
    LENGTH,
    OUT,
    PARTIAL,
    PARTIAL_LSE,
    q_batch,
    q_head,
    out_batch,
    out_head,
    layer,
    B,
    G,
    C,
    parts,
    part,
    scale,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program for each row, key-value head and part: its GROUP query heads on `part` slots.

    WHOLE rows go to OUT [B, H, D]; parts, each with a softmax of its own, to PARTIAL and PARTIAL_LSE.
    """
    index = tl.program_id(0) % parts
    pair = tl.program_id(0) // parts
    row = (pair // G).to(tl.int64)
    head = (pair % G).to(tl.int64)
    length = tl.load(LENGTH + row)
    first = index * part
    last = tl.minimum(first + part, length)
    member = tl.arange(0, M)
    column = tl.arange(0, PADDED)
    mask = (member < GROUP)[:, None] & (column < D)[None, :]
    heads = head * GROUP + member
    q = tl.load(Q + row * q_batch + heads[:, None] * q_head + column[None, :], mask=mask, other=0.0)  # [M, PADDED]
    base = ((layer * B + row) * G + head) * C * D
    peak = tl.full([M], MASKED, tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, PADDED], tl.float32)
    # Every tile holds a key, so that no row's peak stays MASKED. Where there is none the loop ends at once.
    for start in tl.range(first, last, N):
        slot = start + tl.arange(0, N)
        filled = slot < last
        offsets = slot[:, None] * D + column[None, :]
        inside = filled[:, None] & (column < D)[None, :]
        # What is past the last key may be anything, and 0 times a NaN is NaN.
        k = tl.load(KEYS + base + offsets, mask=inside, other=0.0)  # [N, PADDED]
        v = tl.load(VALUES + base + offsets, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where(filled[None, :], scores, MASKED)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new_peak[:, None])
        shrink = tl.math.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        peak = new_peak
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    if WHOLE:
        target = OUT + row * out_batch + heads[:, None] * out_head + column[None, :]
        tl.store(target, out.to(OUT.dtype.element_ty), mask=mask)
    elif first < length:
        place = (row * G * GROUP + heads) * parts + index
        tl.store(PARTIAL + place[:, None] * D + column[None, :], out, mask=mask)
        tl.store(PARTIAL_LSE + place, peak + tl.math.log2(total), mask=member < GROUP)


@triton.jit(do_not_specialize=VARYING)
def combine_kernel(
    PARTIAL,
    PARTIAL_LSE,
    LENGTH,
    OUT,
    out_batch,
    out_head,
    H,
    parts,
    part,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One program for each row and query head, SIZE >= P: the mean of its parts that hold keys, by their weights."""
    row = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    index = tl.arange(0, SIZE)
    column = tl.arange(0, PADDED)
    filled = index * part < tl.load(LENGTH + row)
    place = (row * H + head) * parts + index
    lse = tl.load(PARTIAL_LSE + place, mask=filled, other=MASKED)
    weights = tl.where(filled, tl.math.exp2(lse - tl.max(lse, 0)), 0.0)
    total = tl.sum(weights, 0)
    mask = filled[:, None] & (column < D)[None, :]
    partial = tl.load(PARTIAL + place[:, None] * D + column[None, :], mask=mask, other=0.0)  # [SIZE, PADDED]
    out = tl.sum(partial * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    target = OUT + row * out_batch + head * out_head + column
    tl.store(target, out.to(OUT.dtype.element_ty), mask=column < D)

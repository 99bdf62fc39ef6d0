"""Backward kernels of separator attention: dQ and dK/dV, one launch each, no atomics, the same bits every time.

Shape letters: B sequences, H query heads, G query heads per key-value head, S tokens of which the last ROWS are
queries, P = ROWS rounded up to a multiple of 128, T tiers; M query rows of a tile (in dQ: M / PACK queries of each of
PACK heads), N keys of a tile, D head dimension.
Names as in flash-attention's Triton code: qk scores, p = exp2(qk - lse), do the gradient of the output, delta =
rowsum(out * do), dp = do @ v^T, ds = p * (dp - delta).
"""

# The compiler types the arguments of kernels, anew for each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from sep_attention.triton.forward import VARYING
from sep_attention.triton.tiles import (
    LOG2E,
    compact_range,
    in_sight,
    key_positions,
    key_slots,
    key_spans,
    load_rows,
    local_start,
    reach_of,
    store_rows,
)

# Query rows of the statistics are padded to a multiple of this, so that no tile of dK/dV reads past them.
ROW_PADDING = tl.constexpr(128)


@triton.jit(do_not_specialize=VARYING)
def attention_backward_q(
    Q,
    K,
    V,
    OUT,
    DOUT,
    DQ,
    LSE,
    STATISTICS,
    TIER,
    PREFIX,
    POSITIONS,
    DOCUMENT_START,
    DOCUMENT_END,
    SINK,
    DSINK,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    dout_batch,
    dout_head,
    dout_row,
    dq_batch,
    dq_head,
    dq_row,
    B,
    H,
    G,
    S,
    ROWS,
    window,
    reach1,
    reach2,
    reach3,
    reach4,
    scale,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PACK: tl.constexpr,
    T: tl.constexpr,
    FINITE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    HAS_SINK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """DQ [B, H, ROWS, D]; also what the dK/dV kernel and the sink need.

    STATISTICS f32 [2, B, H, P]: the forward pass's LSE in base 2, and delta = rowsum(OUT * DOUT).
    DSINK f32 [B, H, blocks of queries]: each block's share of the sink's gradient.
    """
    QUERIES: tl.constexpr = M // PACK
    num_blocks = tl.cdiv(ROWS, QUERIES)
    block = num_blocks - 1 - tl.program_id(0) % num_blocks  # the longest first
    pack = tl.program_id(0) // num_blocks
    batch = (pack // (H // PACK)).to(tl.int64)
    head = pack % (H // PACK) * PACK
    first_query = S - ROWS + block * QUERIES
    last_query = tl.minimum(first_query + QUERIES, S) - 1

    row = tl.arange(0, M)
    columns = tl.arange(0, PADDED)
    query = first_query + row % QUERIES
    query_row = block * QUERIES + row % QUERIES
    row_head = (head + row // QUERIES).to(tl.int64)
    row_ok = query_row < ROWS
    safe_row = tl.minimum(query_row, ROWS - 1).to(tl.int64)
    q = load_rows(Q + batch * q_batch, row_head * q_head + safe_row * q_row, columns, D, PADDED)
    do = load_rows(DOUT + batch * dout_batch, row_head * dout_head + safe_row * dout_row, columns, D, PADDED)
    out = load_rows(OUT + batch * out_batch, row_head * out_head + safe_row * out_row, columns, D, PADDED)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    head_row = batch * H + row_head
    lse = tl.load(LSE + head_row * ROWS + safe_row) * LOG2E
    padded_rows = tl.cdiv(ROWS, ROW_PADDING) * ROW_PADDING
    statistics = STATISTICS + head_row * padded_rows + query_row
    tl.store(statistics, lse, mask=row_ok)
    tl.store(statistics + B.to(tl.int64) * H * padded_rows, delta, mask=row_ok)
    if HAS_SINK:
        sink = tl.load(SINK + row_head).to(tl.float32) * LOG2E
        share = tl.where(row_ok, -tl.math.exp2(sink - lse) * delta, 0.0)
        packed_head = batch * H + head + tl.arange(0, PACK)
        tl.store(DSINK + packed_head * num_blocks + block, tl.sum(tl.reshape(share, (PACK, QUERIES)), 1))

    k_base = K + batch * k_batch + (head // G).to(tl.int64) * k_head
    v_base = V + batch * v_batch + (head // G).to(tl.int64) * v_head
    tiers = TIER + batch * S
    document_end = DOCUMENT_END + batch * S
    first_document = 0
    last_document = 0
    if DOCUMENTS:
        first_document = tl.load(DOCUMENT_START + batch * S + first_query)
        last_document = tl.load(DOCUMENT_START + batch * S + last_query)
    local = local_start(first_query, first_document, window)
    num_local = tl.cdiv(last_query + 1 - local, N)
    reaches = (window, reach1, reach2, reach3, reach4)
    dq = tl.zeros([M, PADDED], tl.float32)
    for tier in tl.range(1, T + 1):
        plane = (tier - 1) * B + batch
        positions = POSITIONS + plane * S
        low, full, high = compact_range(
            PREFIX + plane * (S + 1), first_query, last_query, local, first_document, last_document,
            reach_of(tier, reaches, T), FINITE, DOCUMENTS,
        )  # fmt: skip
        num_compact = tl.cdiv(high - low, N)
        for index in tl.range(0, num_compact + tl.where(tier == T, num_local, 0)):
            is_local = index >= num_compact
            slot, valid = key_slots(index, num_compact, low, high, local, S, N)
            key = key_positions(positions, slot, valid, is_local)
            k = load_rows(k_base, key * k_row, columns, D, PADDED)  # [N, D]
            v = load_rows(v_base, key * v_row, columns, D, PADDED)
            qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
            p = tl.math.exp2(qk * (scale * LOG2E) - lse[:, None])
            first = low + index * N
            if is_local | (first < full) | (first + N > high):
                slot, valid = key_slots(index, num_compact, low, high, local, S, N)
                key = key_positions(positions, slot, valid, is_local)
                span = key_spans(tiers, document_end, key, valid, reaches, T, DOCUMENTS)
                p = tl.where(in_sight(query[:, None], key[None, :], span[None, :]), p, 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    offsets = row_head * dq_head + query_row.to(tl.int64) * dq_row
    store_rows(DQ + batch * dq_batch, offsets, columns, dq * scale, row_ok, D, PADDED)


@triton.jit
def _owned_tile(program, prefix, plane_stride, S, reaches, N: tl.constexpr, T: tl.constexpr):
    """Keys that a program owns: its tier (0 for a tile of the sequence itself), first slot and number of slots.

    Tiers whose horizon exceeds the window come first, tile by tile; a program past their last tile gets no slots.
    """
    num_compact = tl.cdiv(S, N) + T - 1  # an upper bound known without reading the counts
    tier = 0
    first = (program - num_compact) * N
    count = S
    if program < num_compact:
        tile = program
        count = 0
        first = 0
        for candidate in tl.static_range(1, T + 1):
            if reach_of(candidate, reaches, T) > reaches[0]:
                size = tl.load(prefix + (candidate - 1) * plane_stride + S)
                if (tile >= 0) & (tile * N < size):
                    tier = candidate
                    first = tile * N
                    count = size
                tile -= tl.cdiv(size, N)
    return tier, first, count


@triton.jit(do_not_specialize=VARYING)
def attention_backward_kv(
    Q,
    K,
    V,
    DOUT,
    DK,
    DV,
    STATISTICS,
    TIER,
    PREFIX,
    POSITIONS,
    DOCUMENT_END,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    dout_batch,
    dout_head,
    dout_row,
    dk_batch,
    dk_head,
    dk_row,
    dv_batch,
    dv_head,
    dv_row,
    B,
    H,
    G,
    S,
    ROWS,
    window,
    reach1,
    reach2,
    reach3,
    reach4,
    scale,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    WITH_K: tl.constexpr,
    WITH_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """DK and DV [B, H / G, S, D], or one of them, every row written once.

    The programs that come first own the rows of special keys and read all queries that see them. Then each tile of
    the sequence has a program that reads the window after it and stores the rows the others do not own.
    """
    num_tiles = tl.cdiv(S, N)
    num_compact = num_tiles + T - 1
    num_heads = H // G
    compact_programs = num_compact * num_heads * B
    program = tl.program_id(0)
    is_compact = program < compact_programs
    per_head = tl.where(is_compact, num_compact, num_tiles)
    program -= tl.where(is_compact, 0, compact_programs)
    pair = program // per_head
    tile = program % per_head + tl.where(is_compact, 0, num_compact)
    batch = (pair // num_heads).to(tl.int64)
    kv_head = (pair % num_heads).to(tl.int64)
    reaches = (window, reach1, reach2, reach3, reach4)
    plane_stride = B.to(tl.int64) * (S + 1)
    tier, first, count = _owned_tile(tile, PREFIX + batch * (S + 1), plane_stride, S, reaches, N, T)
    if first < count:
        columns = tl.arange(0, PADDED)
        slot = first + tl.arange(0, N)
        valid = slot < count
        plane = tl.maximum(tier - 1, 0) * B + batch
        positions = POSITIONS + plane * S
        key = tl.where(tier == 0, slot, tl.load(positions + slot, mask=valid & (tier > 0), other=0))
        key = tl.where(valid, key, 0)
        reach = reach_of(tier, reaches, T)
        end = key * 0 + S
        if DOCUMENTS:
            end = tl.load(DOCUMENT_END + batch * S + key)
        end = tl.minimum(end, key + reach)  # the first query after the key that does not see it
        first_end = tl.min(tl.where(valid, end, S), 0)
        last_key = tl.max(key, 0)
        # Rows count the queries there are. No row reads a key whose queries all lie before them.
        before = S - ROWS
        first_row = tl.multiple_of(tl.maximum(tl.min(tl.where(valid, key, S), 0) - before, 0) // M * M, M)
        last_end = tl.max(tl.where(valid, end, 0), 0)
        blocks = tl.cdiv(tl.maximum(last_end - before - first_row, 0), M)

        k = load_rows(K + batch * k_batch + kv_head * k_head, key * k_row, columns, D, PADDED)  # [N, D]
        v = load_rows(V + batch * v_batch + kv_head * v_head, key * v_row, columns, D, PADDED)
        dk = tl.zeros([N, PADDED], tl.float32)
        dv = tl.zeros([N, PADDED], tl.float32)
        padded_rows = tl.multiple_of(tl.cdiv(ROWS, ROW_PADDING) * ROW_PADDING, ROW_PADDING)
        delta_offset = B.to(tl.int64) * H * padded_rows
        span = end - key
        # One loop over heads and query blocks, so that the pipeline runs on from head to head.
        for step in tl.range(0, blocks * G):
            group = step // blocks
            head = kv_head * G + group
            row = first_row + (step - group * blocks) * M + tl.arange(0, M)
            start = before + first_row + (step - group * blocks) * M
            query = before + row
            safe_row = tl.minimum(row, ROWS - 1)
            q = load_rows(Q + batch * q_batch + head * q_head, safe_row * q_row, columns, D, PADDED)  # [M, D]
            do = load_rows(DOUT + batch * dout_batch + head * dout_head, safe_row * dout_row, columns, D, PADDED)
            statistics = STATISTICS + (batch * H + head) * padded_rows + row
            lse = tl.load(statistics)
            delta = tl.load(statistics + delta_offset)
            qk = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [N, M]
            p = tl.math.exp2(qk * (scale * LOG2E) - lse[None, :])
            if (start < last_key) | (start + M > first_end):
                p = tl.where(in_sight(query[None, :], key[:, None], span[:, None]), p, 0.0)
            if WITH_V:
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            if WITH_K:
                dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                ds = p * (dp - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        tier_of_key = tl.load(TIER + batch * S + key).to(tl.int32)
        stored = valid & ((tier > 0) | (reach_of(tier_of_key, reaches, T) == window))
        offsets = key.to(tl.int64)
        if WITH_K:
            at = DK + batch * dk_batch + kv_head * dk_head
            store_rows(at, offsets * dk_row, columns, dk * scale, stored, D, PADDED)
        if WITH_V:
            at = DV + batch * dv_batch + kv_head * dv_head
            store_rows(at, offsets * dv_row, columns, dv, stored, D, PADDED)

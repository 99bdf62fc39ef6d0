"""Forward kernel of separator attention: one launch, one online softmax over gathered keys and the local band.

Shape letters: B sequences, H query heads, G query heads per key-value head, S tokens of which the last ROWS are
queries, T tiers; M rows of a tile, that is M / PACK queries of each of PACK heads; N keys of a tile; D head dimension.
Names as in flash-attention's Triton code: qk scores, m_i running row maxima and m_ij those with this tile, p =
exp2(qk - m_ij), alpha = exp2(m_i - m_ij), l_i running row sums, acc the output before its division by l_i.
"""

# The compiler types the arguments of kernels, anew for each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from sep_attention.triton.tiles import (
    LN2,
    LOG2E,
    MASKED,
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

# Values that differ between layers and batches: the compiled kernel must not depend on them.
VARYING = ["B", "H", "G", "S", "ROWS", "window", "reach1", "reach2", "reach3", "reach4"]


@triton.jit
def _attend_tier(
    acc,
    l_i,
    m_i,
    q,
    query,
    K,
    V,
    k_row,
    v_row,
    positions,
    tiers,
    document_end,
    low,
    full,
    high,
    local,
    num_local,
    S,
    tier,
    reaches,
    scale,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds a tier's gathered keys and `num_local` tiles of the band to a running softmax (acc, l_i, m_i)."""
    columns = tl.arange(0, PADDED)
    num_compact = tl.cdiv(high - low, N)
    for index in tl.range(0, num_compact + num_local):
        is_local = index >= num_compact
        slot, valid = key_slots(index, num_compact, low, high, local, S, N)
        key = key_positions(positions, slot, valid, is_local)
        k = load_rows(K, key * k_row, columns, D, PADDED)  # [N, D]
        v = load_rows(V, key * v_row, columns, D, PADDED)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
        first = low + index * N
        if is_local | (first < full) | (first + N > high):
            slot, valid = key_slots(index, num_compact, low, high, local, S, N)
            key = key_positions(positions, slot, valid, is_local)
            span = key_spans(tiers, document_end, key, valid, reaches, T, DOCUMENTS)
            qk = tl.where(in_sight(query[:, None], key[None, :], span[None, :]), qk, MASKED)
        top = tl.max(qk, 1)
        m_ij = tl.where(top > MASKED, tl.maximum(m_i, top * scale), m_i)
        # A row that has seen no key yet subtracts nothing: the compiler fuses the next line's product and difference,
        # which rounds MASKED * scale in another way than a maximum would be, to more than exp2 can hold.
        shift = tl.where(m_ij > MASKED, m_ij, 0.0)
        p = tl.math.exp2(qk * scale - shift[:, None])
        alpha = tl.math.exp2(m_i - m_ij)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_ij
    return acc, l_i, m_i


@triton.jit(do_not_specialize=VARYING)
def attention_forward(
    Q,
    K,
    V,
    OUT,
    LSE,
    TIER,
    PREFIX,
    POSITIONS,
    DOCUMENT_START,
    DOCUMENT_END,
    SINK,
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
    """OUT [B, H, ROWS, D] and LSE f32 [B, H, ROWS], the natural logarithm of the softmax denominators with the sink."""
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

    m_i = tl.full([M], MASKED, tl.float32)
    l_i = tl.zeros([M], tl.float32)
    if HAS_SINK:
        m_i = tl.load(SINK + row_head).to(tl.float32) * LOG2E
        l_i += 1.0
    acc = tl.zeros([M, PADDED], tl.float32)
    reaches = (window, reach1, reach2, reach3, reach4)
    for tier in tl.range(1, T + 1):
        plane = (tier - 1) * B + batch
        low, full, high = compact_range(
            PREFIX + plane * (S + 1), first_query, last_query, local, first_document, last_document,
            reach_of(tier, reaches, T), FINITE, DOCUMENTS,
        )  # fmt: skip
        acc, l_i, m_i = _attend_tier(
            acc, l_i, m_i, q, query, k_base, v_base, k_row, v_row, POSITIONS + plane * S, tiers, document_end,
            low, full, high, local, tl.where(tier == T, num_local, 0), S, tier,
            reaches, scale * LOG2E, D, PADDED, N, T, DOCUMENTS, PRECISION,
        )  # fmt: skip

    offsets = row_head * out_head + query_row.to(tl.int64) * out_row
    store_rows(OUT + batch * out_batch, offsets, columns, acc / l_i[:, None], row_ok, D, PADDED)
    tl.store(LSE + (batch * H + row_head) * ROWS + query_row, (m_i + tl.math.log2(l_i)) * LN2, mask=row_ok)

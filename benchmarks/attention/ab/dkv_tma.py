"""dK/dV with Q and dO by TMA descriptors: the paper's pattern alone (one tier, no documents).

q and dout are [B, S, H, D].
"""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = tl.constexpr(1.4426950408889634)
GROUP = tl.constexpr(8)  # pairs of a sequence and a head whose programs start together


@triton.jit(do_not_specialize=["B", "H", "G", "S", "window"])
def backward_kv_tma(
    Q, DOUT, K, V, DK, DV, STATISTICS, TIER, PREFIX, POSITIONS, k_batch, k_head, k_row, B, H, G, S, window, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """As `attention_backward_kv`: compact programs first, then the local band; each row of DK and DV written once."""
    num_tiles = tl.cdiv(S, N)
    heads = H // G
    pairs = heads * B
    program = tl.program_id(0)
    is_compact = program < num_tiles * pairs
    program -= tl.where(is_compact, 0, num_tiles * pairs)
    first_pair = program // (GROUP * num_tiles) * GROUP
    together = tl.minimum(pairs - first_pair, GROUP)
    inside = program - first_pair * num_tiles
    pair = first_pair + inside % together
    first = inside // together * N
    batch = pair // heads
    kv_head = pair % heads
    count = tl.load(PREFIX + batch.to(tl.int64) * (S + 1) + S)
    if window >= S:
        count = count * 0
    if first < tl.where(is_compact, count, S):
        columns = tl.arange(0, D)
        slot = first + tl.arange(0, N)
        valid = slot < tl.where(is_compact, count, S)
        gathered = tl.load(POSITIONS + batch.to(tl.int64) * S + slot, mask=valid & is_compact, other=0)
        key = tl.where(is_compact, gathered, tl.minimum(slot, S - 1))
        end = tl.where(is_compact, S, tl.minimum(key + window, S))
        span = tl.where(valid, end - key, 0)
        first_end = tl.min(tl.where(valid, end, S), 0)
        last_key = tl.max(tl.where(valid, key, 0), 0)
        last_end = tl.max(tl.where(valid, end, 0), 0)
        begin = tl.min(tl.where(valid, key, S), 0) // M * M
        blocks = tl.cdiv(last_end - begin, M)
        at_kv = batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
        k = tl.load(K + at_kv + key[:, None] * k_row + columns[None, :])  # [N, D]
        v = tl.load(V + at_kv + key[:, None] * k_row + columns[None, :])
        dk = tl.zeros([N, D], tl.float32)
        dv = tl.zeros([N, D], tl.float32)
        padded = tl.cdiv(S, 128) * 128
        delta_offset = B.to(tl.int64) * H * padded
        row = begin
        head = kv_head * G
        for _ in tl.range(0, blocks * G):
            q = Q.load([batch, row, head, 0]).reshape([M, D])
            upstream = DOUT.load([batch, row, head, 0]).reshape([M, D])
            statistics = STATISTICS + (batch * H + head).to(tl.int64) * padded + row + tl.arange(0, M)
            lse = tl.load(statistics)
            delta = tl.load(statistics + delta_offset)
            scores = tl.dot(k, tl.trans(q))  # [N, M]
            weights = tl.math.exp2(scores * (scale * LOG2E) - lse[None, :])
            if (row < last_key) | (row + M > first_end):
                distance = (row + tl.arange(0, M))[None, :] - key[:, None]
                seen = distance.to(tl.uint32, bitcast=True) < span[:, None].to(tl.uint32, bitcast=True)
                weights = tl.where(seen, weights, 0.0)
            dv = tl.dot(weights.to(upstream.dtype), upstream, dv)
            slopes = weights * (tl.dot(v, tl.trans(upstream)) - delta[None, :])
            dk = tl.dot(slopes.to(q.dtype), q, dk)
            wrap = row + M >= begin + blocks * M
            row = tl.multiple_of(tl.where(wrap, begin, row + M), M)
            head += wrap.to(tl.int32)
        special = tl.load(TIER + batch.to(tl.int64) * S + key) > 0
        stored = valid & (is_compact | (special == 0) | (window >= S))
        at = at_kv + key[:, None] * k_row + columns[None, :]
        tl.store(DK + at, (dk * scale).to(DK.dtype.element_ty), mask=stored[:, None])
        tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=stored[:, None])


def launch_arguments(q, k, v, dout, dk, dv, statistics, plan, window, tile):
    """(grid, arguments, options) of a launch; q and the others [B, heads, S, D] are views of [B, S, heads, D]."""
    rows, keys, warps, stages = tile[:4]
    batch, heads, length, size = q.shape

    def descriptor(x):
        return TensorDescriptor.from_tensor(x.transpose(1, 2), [1, rows, 1, size])

    grid = (2 * triton.cdiv(length, keys) * batch * k.shape[1],)
    arguments = (
        descriptor(q), descriptor(dout), k, v, dk, dv, statistics, plan.tier, plan.prefix, plan.positions,
        *k.stride()[:3], batch, heads, heads // k.shape[1], length, min(window, length), size**-0.5,
    )  # fmt: skip
    return grid, arguments, {"D": size, "M": rows, "N": keys, "num_warps": warps, "num_stages": stages}

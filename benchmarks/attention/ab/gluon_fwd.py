"""Forward in Gluon for sm_90: persistent, warp-specialised, keys by TMA; the paper's pattern alone.

Never run yet, only compiled: hold its output to the oracle before any figure of it counts. The special keys are
gathered first, by `gather`, into one buffer a sequence; its time belongs to the forward. S must be a multiple of 128.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@triton.jit(do_not_specialize=["S", "C"])
def gather(K, V, KC, VC, SEEN, POSITIONS, PREFIX, S, C, row, R: tl.constexpr, W: tl.constexpr):
    """KC, VC [B, C, H D]: rows of special keys, zeros up to a multiple of 128; SEEN i32 [B, C]: positions, then S."""
    batch = (tl.program_id(0) // tl.cdiv(C, R)).to(tl.int64)
    slot = tl.program_id(0) % tl.cdiv(C, R) * R + tl.arange(0, R)
    count = tl.load(PREFIX + batch * (S + 1) + S)
    if tl.min(slot, 0) < tl.cdiv(count, 128) * 128:
        valid = slot < count
        position = tl.load(POSITIONS + batch * S + slot, mask=valid, other=0).to(tl.int64)
        tl.store(SEEN + batch * C + slot, tl.where(valid, position, S).to(tl.int32))
        for first in tl.range(0, row, W):
            column = first + tl.arange(0, W)
            inside = (column < row)[None, :] & valid[:, None]
            source = (batch * S + position)[:, None] * row + column[None, :]
            target = (batch * C + slot)[:, None] * row + column[None, :]
            wanted = (column < row)[None, :] & (slot >= 0)[:, None]
            tl.store(KC + target, tl.load(K + source, mask=inside, other=0.0), mask=wanted)
            tl.store(VC + target, tl.load(V + source, mask=inside, other=0.0), mask=wanted)


@gluon.jit
def work(tile, H, NB, PREFIX, S, window, M: gl.constexpr, N: gl.constexpr):
    """Of a tile of queries: its first query, batch, head, number of compact and of local key tiles, first local key.

    Tiles go block by block, the longest first, over all heads."""
    batch = tile // (NB * H)
    inside = tile % (NB * H)
    block = NB - 1 - inside // H
    head = inside % H
    q0 = block * M
    last = q0 + M - 1
    count = gl.load(PREFIX + batch * (S + 1) + gl.maximum(q0 + M - window, 0))
    num_compact = (count + N - 1) // N
    local = gl.maximum(q0 - window + 1, 0) // N * N
    num_local = (last + 1 - local + N - 1) // N
    return q0, batch, head, num_compact, num_local, local


@gluon.jit
def producer(
    dq,
    dk,
    dv,
    dkc,
    dvc,
    qs,
    ks,
    vs,
    qf,
    qe,
    kf,
    ke,
    vf,
    ve,
    PREFIX,
    H,
    NB,
    TILES,
    S,
    C,
    window,
    D: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    ST: gl.constexpr,
):
    n = 0
    i = 0
    H2: gl.constexpr = M // 2
    for tile in range(gl.program_id(0), TILES, gl.num_programs(0)):
        q0, batch, head, num_compact, num_local, local = work(tile, H, NB, PREFIX, S, window, M, N)
        ph = (i & 1) ^ 1
        for c in gl.static_range(2):
            mbarrier.wait(qe.index(c), ph)
            mbarrier.expect(qf.index(c), dq.block_type.nbytes)
            tma.async_copy_global_to_shared(dq, [batch * S + q0 + c * H2, head * D], qf.index(c), qs.index(c))
        for t in range(num_local + num_compact):
            b = n % ST
            p = ((n // ST) & 1) ^ 1
            is_local = t < num_local
            # the local band first: its addresses need no plan
            row = gl.where(is_local, batch * S + local + t * N, batch * C + (t - num_local) * N)
            mbarrier.wait(ke.index(b), p)
            mbarrier.expect(kf.index(b), dk.block_type.nbytes)
            if is_local:
                tma.async_copy_global_to_shared(dk, [row, head * D], kf.index(b), ks.index(b))
            else:
                tma.async_copy_global_to_shared(dkc, [row, head * D], kf.index(b), ks.index(b))
            mbarrier.wait(ve.index(b), p)
            mbarrier.expect(vf.index(b), dv.block_type.nbytes)
            if is_local:
                tma.async_copy_global_to_shared(dv, [row, head * D], vf.index(b), vs.index(b))
            else:
                tma.async_copy_global_to_shared(dvc, [row, head * D], vf.index(b), vs.index(b))
            n += 1
        i += 1  # noqa: SIM113 - a program of the GPU has no enumerate


@gluon.jit
def masked(
    s,
    t,
    num_local,
    local,
    q0,
    POS,
    batch,
    C,
    window,
    cid: gl.constexpr,
    H2: gl.constexpr,
    N: gl.constexpr,
    L: gl.constexpr,
):
    rows = q0 + cid * H2 + gl.arange(0, H2, layout=gl.SliceLayout(1, L))
    col = gl.arange(0, N, layout=gl.SliceLayout(0, L))
    first = q0 + cid * H2
    if t < num_local:
        key0 = local + t * N
        if (key0 + N - 1 > first) | (first + H2 - 1 - key0 >= window):
            d = rows[:, None] - (key0 + col)[None, :]
            s = gl.where((d >= 0) & (d < window), s, -1.0e30)
    else:
        at = (t - num_local) * N
        lastpos = gl.load(POS + batch * C + at + N - 1)
        if lastpos + window > first:
            pos = gl.load(POS + batch * C + at + col)
            s = gl.where(rows[:, None] >= (pos + window)[None, :], s, -1.0e30)
    return s


@gluon.jit
def soft(s, peak, total, scale):
    top = gl.max(s, 1)
    new = gl.maximum(peak, top * scale)
    w = gl.exp2(s * scale - new[:, None])
    shrink = gl.exp2(peak - new)
    total = total * shrink + gl.sum(w, 1)
    return w, shrink, new, total


@gluon.jit
def consumer(
    cid: gl.constexpr,
    do,
    qs,
    ks,
    vs,
    qf,
    qe,
    kf,
    ke,
    vf,
    ve,
    LSE,
    PREFIX,
    POS,
    H,
    NB,
    TILES,
    S,
    C,
    window,
    scale,
    D: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    ST: gl.constexpr,
    os,
):
    H2: gl.constexpr = M // 2
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LP: gl.constexpr = gl.DotOperandLayout(0, LO, 2)
    n = 0
    i = 0
    for tile in range(gl.program_id(0), TILES, gl.num_programs(0)):
        q0, batch, head, num_compact, num_local, local = work(tile, H, NB, PREFIX, S, window, M, N)
        peak = gl.full([H2], -1.0e30, gl.float32, gl.SliceLayout(1, L))
        total = gl.full([H2], 0.0, gl.float32, gl.SliceLayout(1, L))
        acc = gl.full([H2, D], 0.0, gl.float32, LO)
        mbarrier.wait(qf.index(cid), i & 1)
        q = qs.index(cid)
        zero = gl.full([H2, N], 0.0, gl.float32, L)
        b = n % ST
        ph = (n // ST) & 1
        mbarrier.wait(kf.index(b), ph)
        s = warpgroup_mma(q, ks.index(b).permute([1, 0]), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(ke.index(b), count=1)
        s = masked(s, 0, num_local, local, q0, POS, batch, C, window, cid, H2, N, L)
        w, shrink, peak, total = soft(s, peak, total, scale)
        for t in range(1, num_local + num_compact):
            bn = (n + 1) % ST
            phn = ((n + 1) // ST) & 1
            mbarrier.wait(kf.index(bn), phn)
            s = warpgroup_mma(q, ks.index(bn).permute([1, 0]), zero, use_acc=False, is_async=True)
            p = gl.convert_layout(w.to(gl.bfloat16), LP)
            mbarrier.wait(vf.index(b), ph)
            acc = warpgroup_mma(p, vs.index(b), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            mbarrier.arrive(ke.index(bn), count=1)
            s = masked(s, t, num_local, local, q0, POS, batch, C, window, cid, H2, N, L)
            w, shrink, peak, total = soft(s, peak, total, scale)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(ve.index(b), count=1)
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, LO))[:, None]
            b = bn
            ph = phn
            n += 1
        p = gl.convert_layout(w.to(gl.bfloat16), LP)
        mbarrier.wait(vf.index(b), ph)
        acc = warpgroup_mma(p, vs.index(b), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(qe.index(cid), count=1)
        mbarrier.arrive(ve.index(b), count=1)
        n += 1
        i += 1  # noqa: SIM113 - a program of the GPU has no enumerate
        out = acc / gl.convert_layout(total, gl.SliceLayout(1, LO))[:, None]
        tma.store_wait(0)
        os.index(cid).store(out.to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(do, [batch * S + q0 + cid * H2, head * D], os.index(cid))
        rows = (batch * H + head) * S + q0 + cid * H2 + gl.arange(0, H2, layout=gl.SliceLayout(1, L))
        gl.store(LSE + rows, (peak + gl.log2(total)) * 0.6931471805599453)
    tma.store_wait(0)


@gluon.jit
def kernel(
    dq,
    dk,
    dv,
    dkc,
    dvc,
    do,
    LSE,
    PREFIX,
    POS,
    H,
    NB,
    TILES,
    S,
    C,
    window,
    scale,
    D: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    ST: gl.constexpr,
    RC: gl.constexpr,
    RP: gl.constexpr,
):
    dt: gl.constexpr = gl.bfloat16
    H2: gl.constexpr = M // 2
    qs = gl.allocate_shared_memory(dt, [2, H2, D], dq.layout)
    os = gl.allocate_shared_memory(dt, [2, H2, D], do.layout)
    ks = gl.allocate_shared_memory(dt, [ST, N, D], dk.layout)
    vs = gl.allocate_shared_memory(dt, [ST, N, D], dv.layout)
    BL: gl.constexpr = mbarrier.MBarrierLayout()
    qf = gl.allocate_shared_memory(gl.int64, [2, 1], BL)
    qe = gl.allocate_shared_memory(gl.int64, [2, 1], BL)
    kf = gl.allocate_shared_memory(gl.int64, [ST, 1], BL)
    ke = gl.allocate_shared_memory(gl.int64, [ST, 1], BL)
    vf = gl.allocate_shared_memory(gl.int64, [ST, 1], BL)
    ve = gl.allocate_shared_memory(gl.int64, [ST, 1], BL)
    for c in gl.static_range(2):
        mbarrier.init(qf.index(c), count=1)
        mbarrier.init(qe.index(c), count=1)
    for c in gl.static_range(ST):
        mbarrier.init(kf.index(c), count=1)
        mbarrier.init(ke.index(c), count=2)
        mbarrier.init(vf.index(c), count=1)
        mbarrier.init(ve.index(c), count=2)
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    0,
                    do,
                    qs,
                    ks,
                    vs,
                    qf,
                    qe,
                    kf,
                    ke,
                    vf,
                    ve,
                    LSE,
                    PREFIX,
                    POS,
                    H,
                    NB,
                    TILES,
                    S,
                    C,
                    window,
                    scale,
                    D,
                    M,
                    N,
                    ST,
                    os,
                ),
            ),
            (
                consumer,
                (
                    1,
                    do,
                    qs,
                    ks,
                    vs,
                    qf,
                    qe,
                    kf,
                    ke,
                    vf,
                    ve,
                    LSE,
                    PREFIX,
                    POS,
                    H,
                    NB,
                    TILES,
                    S,
                    C,
                    window,
                    scale,
                    D,
                    M,
                    N,
                    ST,
                    os,
                ),
            ),
            (
                producer,
                (
                    dq,
                    dk,
                    dv,
                    dkc,
                    dvc,
                    qs,
                    ks,
                    vs,
                    qf,
                    qe,
                    kf,
                    ke,
                    vf,
                    ve,
                    PREFIX,
                    H,
                    NB,
                    TILES,
                    S,
                    C,
                    window,
                    D,
                    M,
                    N,
                    ST,
                ),
            ),
        ],
        [4, 1],
        [RC, RP],
    )


TILES = {64: (128, 128, 2), 128: (128, 64, 3)}  # head size: query rows, keys, stages


def launches(q, k, v, plan, window, programs):
    """Two launches (function, grid, arguments, options) and their outputs; tensors [B, H, S, D] lie as [B, S, H, D]."""
    batch, heads, length, size = q.shape
    rows, keys, stages = TILES[size]
    if length % 128 or k.shape[1] != heads:
        raise ValueError("the Gluon forward needs S % 128 == 0 and a key head for each query head")
    slots = length
    flat = [x.transpose(1, 2).reshape(batch * length, heads * size) for x in (q, k, v)]
    gathered = [torch.zeros(batch * slots, heads * size, dtype=q.dtype, device=q.device) for _ in range(2)]
    seen = torch.full((batch, slots), length, dtype=torch.int32, device=q.device)
    out = torch.empty(batch, length, heads, size, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)

    def descriptor(x, height):
        layout = gl.NVMMASharedLayout.get_default_for([height, size], gl.bfloat16)
        return TensorDescriptor.from_tensor(x, [height, size], layout)

    half = rows // 2
    blocks = length // rows
    first = (
        gather, (batch * triton.cdiv(slots, 16),),
        (flat[1], flat[2], *gathered, seen, plan.positions, plan.prefix, length, slots, heads * size),
        {"R": 16, "W": 512, "num_warps": 8},
    )  # fmt: skip
    total = blocks * batch * heads
    second = (
        kernel, (min(programs, total),),
        (
            descriptor(flat[0], half), descriptor(flat[1], keys), descriptor(flat[2], keys),
            descriptor(gathered[0], keys), descriptor(gathered[1], keys),
            descriptor(out.view(batch * length, heads * size), half), lse, plan.prefix, seen, heads, blocks, total,
            length, slots, window, size**-0.5 * 1.4426950408889634,
        ),
        {"D": size, "M": rows, "N": keys, "ST": stages, "RC": 240, "RP": 24, "num_warps": 4},
    )  # fmt: skip
    return [first, second], out.transpose(1, 2), lse

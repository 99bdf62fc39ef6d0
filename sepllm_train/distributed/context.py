"""Context parallelism: each rank holds a part of every sequence and fetches the keys that its queries can see.

Sequences are cut into 2C chunks, of which rank r of C holds chunks r and 2C - 1 - r (*zigzag*): what a chunk attends
grows about linearly with its place, so that the sums of all ranks are alike. megatron-core's rotary embedding cuts the
same way (`rope_utils.get_pos_emb_on_this_cp_rank`).

Let R be a layer's reach: beyond it, a query sees nothing but the permanent (global) keys, those of tier 1. A chunk of
queries [a, b) then sees the keys of tier 1 before a - R + 1 and, nearer, possibly any key. These keys in ascending
order make a shorter *virtual sequence* whose last positions are the queries. Distances below R, document boundaries
and the order of keys are as in the real sequence, so that the layer's window and horizons hold in it unchanged. A full
layer has a reach of the whole sequence: the same exchange then gathers every earlier key.

All ranks know all separators, so counts and orders are known on the host without communication.

Shape letters: B sequences of S tokens, C ranks, L = S / C tokens of a rank, N key-value heads, D head dimension, V
positions of a virtual sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from sep_attention import AttentionPlan, build_plan
from torch import Tensor
from torch.autograd.function import once_differentiable

# Virtual sequences are as long as the separators have it: rounded up, so that kernels and allocators meet few lengths.
LENGTH_MULTIPLE = 64


@dataclass
class ContextGroup:
    """This rank's place among the `size` ranks that share its sequences, and the count of what it has sent them."""

    rank: int
    size: int
    group: dist.ProcessGroup | None = None
    sent_bytes: int = field(default=0, compare=False)

    def take_sent_bytes(self) -> int:
        """Bytes sent to other ranks since the last call."""
        taken, self.sent_bytes = self.sent_bytes, 0
        return taken

    def exchange(self, target: Tensor, source: Tensor, target_counts: list[int], source_counts: list[int]) -> None:
        """Send each rank its run of rows of `source` and fill `target` with what they send, both in rank order."""
        self.sent_bytes += source.numel() * source.element_size()
        dist.all_to_all_single(target, source, target_counts, source_counts, group=self.group)


def zigzag(length: int, rank: int, size: int) -> tuple[range, range]:
    """Positions of the two chunks that a rank of `size` holds of `length` tokens (a multiple of 2 * size)."""
    chunk = length // (2 * size)
    first, second = rank * chunk, (2 * size - 1 - rank) * chunk
    return range(first, first + chunk), range(second, second + chunk)


def part_of(tensor: Tensor, rank: int, size: int) -> Tensor:
    """The part [B, L] of [B, S] that a rank holds: its two chunks, one after the other."""
    chunks = zigzag(tensor.shape[1], rank, size)
    return torch.cat([tensor[:, chunk.start : chunk.stop] for chunk in chunks], dim=1)


def visible_keys(plan: AttentionPlan, reach: int, queries: range) -> Tensor:
    """bool [B, S]: keys of `plan` that a query of the chunk `queries` may see in a layer of this reach.

    They are the keys from `queries.start - reach + 1` to the chunk's end and the keys of tier 1 before them, without
    those of documents that ended before the chunk.
    """
    position = torch.arange(plan.sequence_length, device=plan.tier.device)
    keys = (plan.tier == 1) | (position > queries.start - reach)
    keys &= position < queries.stop
    if plan.document_start is not None:
        keys &= position >= plan.document_start[:, queries.start, None]
    return keys


def needed_keys(plan: AttentionPlan, reach: int, size: int) -> list[Tensor]:
    """For each rank, the keys (bool [B, S]) that its queries may see: of its own chunks and of others'."""
    chunks = (zigzag(plan.sequence_length, rank, size) for rank in range(size))
    return [visible_keys(plan, reach, first) | visible_keys(plan, reach, second) for first, second in chunks]


def keys_sent(plan: AttentionPlan, reach: int, size: int) -> Tensor:
    """i64 [C, C]: keys that rank r (row) sends to rank s in the forward pass of one layer, summed over sequences."""
    needed = needed_keys(plan, reach, size)
    counts = [[int(part_of(keys, rank, size).sum()) for keys in needed] for rank in range(size)]
    return torch.tensor(counts).fill_diagonal_(0)


def ring_keys(length: int, size: int) -> int:
    """Keys of a sequence that each rank sends in the forward pass of a layer under ring attention (Liu et al. 2023,
    "Ring Attention with Blockwise Transformers"): every part of S / C keys is passed on C - 1 times."""
    return (size - 1) * (length // size)


@dataclass(frozen=True, eq=False)
class VirtualChunk:
    """The virtual sequences of one of a rank's two chunks: their plan, and `index` i64 [B * V], pool rows of the keys.

    Shorter rows are padded in front; the padding is out of every query's sight and stands for the pool's last row.
    """

    plan: AttentionPlan
    index: Tensor


@dataclass(frozen=True, eq=False)
class Exchange:
    """Traffic of one rank in the layers of one reach: keys it sends, receives and reads.

    The rank's *pool* holds its own keys (row l * B + b is its token l of sequence b), then the received ones in rank
    order, then one row of zeros.

    Attributes:
        send: i64, pool rows of the keys to send, in the order of the receiving ranks.
        send_counts, receive_counts: keys per rank.
        chunks: the virtual sequences of this rank's two chunks.
    """

    send: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    chunks: tuple[VirtualChunk, VirtualChunk]


def plan_exchange(
    plan: AttentionPlan, reach: int, rank: int, size: int, device: torch.device | str = "cpu"
) -> Exchange:
    """Work out the exchange of a micro-batch on the host.

    plan: of the whole sequences, on the host; S must be a multiple of 2 * size. device: where the results are wanted.
    """
    batch, length = plan.tier.shape
    needed = needed_keys(plan, reach, size)
    nothing = torch.empty(0, dtype=torch.int64)

    def rows_of(owner: int, reader: int) -> Tensor:
        """Numbers l * B + b, ascending, of the keys that `owner` sends to `reader`."""
        return nothing if owner == reader else part_of(needed[reader], owner, size).T.flatten().nonzero().flatten()

    send = [rows_of(rank, reader) for reader in range(size)]
    receive = [rows_of(owner, rank) for owner in range(size)]
    pool_row = torch.full((batch, length), -1)
    received = batch * length // size
    for owner, rows in enumerate(receive):
        mine = owner == rank
        rows = torch.arange(batch * length // size) if mine else rows
        first = 0 if mine else received
        positions = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in zigzag(length, owner, size)])
        pool_row[rows % batch, positions[rows // batch]] = torch.arange(first, first + len(rows))
        received += 0 if mine else len(rows)
    early, late = zigzag(length, rank, size)
    return Exchange(
        send=_on(torch.cat(send), device),
        send_counts=[len(rows) for rows in send],
        receive_counts=[len(rows) for rows in receive],
        chunks=(
            _virtual_chunk(plan, reach, early, pool_row, received, device),
            _virtual_chunk(plan, reach, late, pool_row, received, device),
        ),
    )


def _virtual_chunk(
    plan: AttentionPlan, reach: int, queries: range, pool_row: Tensor, empty_row: int, device: torch.device | str
) -> VirtualChunk:
    """Virtual sequences of the chunk `queries`. `pool_row`: i64 [B, S]; `empty_row`: number of the row of zeros."""
    batch = plan.batch_size
    keys = visible_keys(plan, reach, queries)
    counts = keys.sum(1).tolist()
    # Without separators to gather and documents to leave out, rows are of one length: that of the real sequence.
    whole = queries.start < reach and plan.document_start is None
    length = queries.stop if whole else -(-max(counts) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    index = torch.full((batch, length), empty_row)
    tier = torch.zeros(batch, length, dtype=torch.uint8)
    starts = None if plan.document_start is None else torch.zeros(batch, length, dtype=torch.int32)
    for row, count in enumerate(counts):
        positions = keys[row].nonzero().flatten()
        index[row, length - count :] = pool_row[row, positions]
        tier[row, length - count :] = plan.tier[row, positions]
        if starts is not None and plan.document_start is not None:
            # What starts before the chunk is seen from the first key on; the chunk itself has no gaps.
            start = plan.document_start[row, positions]
            starts[row, length - count :] = torch.where(
                start <= queries.start, length - count, start + (length - queries.stop)
            )
    virtual = build_plan(
        _on(tier, device),
        document_start=None if starts is None else _on(starts, device),
        num_tiers=plan.num_tiers,
    )
    return VirtualChunk(virtual, _on(index.flatten(), device))


def _on(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor on `device`, without waiting for the device."""
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class ContextPlan:
    """A micro-batch's attention plan on one context-parallel rank; layers of one reach share an exchange.

    `whole` is the plan of the whole sequences, on the host.
    """

    def __init__(self, whole: AttentionPlan, group: ContextGroup, device: torch.device | str) -> None:
        self.whole = whole
        self.group = group
        self.device = device
        self._exchanges: dict[int, Exchange] = {}

    @property
    def sequence_length(self) -> int:
        """S, the tokens of a whole sequence."""
        return self.whole.sequence_length

    def exchange(self, reach: int) -> Exchange:
        """The exchange of the layers of this reach, worked out on first use."""
        reach = min(reach, self.sequence_length)
        if reach not in self._exchanges:
            group = self.group
            self._exchanges[reach] = plan_exchange(self.whole, reach, group.rank, group.size, self.device)
        return self._exchanges[reach]


def fetch_keys(
    key: Tensor, value: Tensor, exchange: Exchange, group: ContextGroup
) -> list[tuple[VirtualChunk, Tensor, Tensor]]:
    """Keys and values that this rank's queries see: for each of its two chunks (chunk, k, v).

    key, value: [L, B, N, D], those of this rank. k, v: [B, N, V, D], of the chunk's virtual sequences. Every rank of
    the group calls this at the same time, and again in the backward pass, which returns each gradient to the key's
    owner and adds it in the order of the ranks.
    """
    first_k, first_v, second_k, second_v = _FetchKeys.apply(key, value, exchange, group)
    first, second = exchange.chunks
    return [(first, first_k, first_v), (second, second_k, second_v)]


class _FetchKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, exchange: Exchange, group: ContextGroup) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.group, ctx.shape, ctx.dtype = exchange, group, key.shape, key.dtype
        length, batch, heads, width = key.shape
        own = length * batch
        pool = key.new_empty(own + sum(exchange.receive_counts) + 1, 2, heads, width)
        _fill(pool[:own].unflatten(0, (length, batch)), key, value)
        pool[-1] = 0
        group.exchange(pool[own:-1], pool.index_select(0, exchange.send), exchange.receive_counts, exchange.send_counts)
        outputs: list[Tensor] = []
        for chunk in exchange.chunks:
            seen = pool.index_select(0, chunk.index).unflatten(0, (batch, -1))
            outputs += seen.permute(2, 0, 3, 1, 4).unbind()
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        exchange, group = ctx.exchange, ctx.group
        length, batch, heads, width = ctx.shape
        own = length * batch
        # A key has gradients from both chunks and from other ranks: half types would lose digits in the sum.
        dtype = torch.float32 if ctx.dtype in (torch.bfloat16, torch.float16) else ctx.dtype
        pool = grads[0].new_zeros(own + sum(exchange.receive_counts) + 1, 2, heads, width, dtype=dtype)
        for chunk, grad_k, grad_v in zip(exchange.chunks, grads[::2], grads[1::2], strict=True):
            seen = pool.new_empty(batch, grad_k.shape[2], 2, heads, width)
            _fill(seen, grad_k.transpose(1, 2), grad_v.transpose(1, 2))
            # No index occurs twice, apart from the padding's, whose row is not read: the order of sums is fixed.
            pool.index_add_(0, chunk.index, seen.flatten(0, 1))
        returned = grads[0].new_empty(len(exchange.send), 2, heads, width)
        group.exchange(returned, pool[own:-1].to(ctx.dtype), exchange.send_counts, exchange.receive_counts)
        parts = zip(exchange.send.split(exchange.send_counts), returned.split(exchange.send_counts), strict=True)
        for rows, part in parts:
            pool.index_add_(0, rows, part.to(dtype))
        grad_k, grad_v = pool[:own].to(ctx.dtype).unflatten(0, (length, batch)).unbind(2)
        return grad_k, grad_v, None, None


def _fill(target: Tensor, key: Tensor, value: Tensor) -> None:
    """Write key and value [X, Y, N, D] side by side into target [X, Y, 2, N, D]."""
    target[:, :, 0] = key
    target[:, :, 1] = value


def mean_keys_sent(plans: Sequence[AttentionPlan], reach: int, size: int) -> float:
    """Keys that a rank sends in the forward pass of one layer for one sequence, on average over ranks and `plans`.

    As many gradients arrive in the backward pass.
    """
    sequences = sum(plan.batch_size for plan in plans)
    return sum(int(keys_sent(plan, reach, size).sum()) for plan in plans) / (size * sequences)

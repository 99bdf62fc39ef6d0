"""FlexAttention's block masks of separator attention, made a row of blocks at a time so that long sequences fit.

Shape letters: B sequences, S queries, L keys, C gathered keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sep_attention import FOREVER, AttentionPlan
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
BLOCK = 128


def build_block_mask(visible: Visible, batch: int, queries: int, keys: int, device: torch.device) -> BlockMask:
    """The mask `visible(b, h, i, j)` in blocks of 128, as `create_block_mask` makes it from an S x L matrix."""
    columns = torch.arange(-(-keys // BLOCK) * BLOCK, device=device)
    row = torch.arange(batch, device=device)[:, None, None]
    some, every = [], []
    for first in range(0, queries, BLOCK):
        query = torch.arange(first, first + BLOCK, device=device)[:, None]
        inside = (query < queries) & (columns < keys)
        seen = inside & visible(row, row, query.clamp(max=queries - 1), columns.clamp(max=keys - 1))
        blocks = seen.expand(batch, -1, -1).unflatten(-1, (-1, BLOCK))
        some.append(blocks.any(-1).any(1))
        every.append(blocks.all(-1).all(1))
    any_seen, all_seen = torch.stack(some, 1), torch.stack(every, 1)  # [B, blocks of queries, blocks of keys]
    partial_counts, partial_order = _listed(any_seen & ~all_seen)
    full_counts, full_order = _listed(all_seen)
    return BlockMask.from_kv_blocks(
        partial_counts,
        partial_order,
        full_counts,
        full_order,
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(queries, keys),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Count and, first in each list, numbers of the blocks that are on; i32 [B, 1, rows] and [B, 1, rows, columns]."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


def plan_mask(plan: AttentionPlan, window: int) -> BlockMask:
    """The paper's pattern of a plan with one tier, over the keys as they are."""
    reach = torch.where(plan.tier > 0, FOREVER, window)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < reach[b, j])

    length = plan.sequence_length
    return build_block_mask(visible, plan.batch_size, length, length, plan.tier.device)


def gathered_mask(plan: AttentionPlan, window: int) -> tuple[BlockMask, Tensor]:
    """The same pattern over keys [special keys, gathered | all keys]: the mask, and i64 [B, C] what to gather.

    C is the largest count of special keys, rounded up to whole blocks; slots past a row's count hold position 0 and
    are hidden. The first part is seen from outside the window, the second within it: no key counts twice.
    """
    counts = plan.prefix[0, :, -1]
    slots = -(-int(counts.max()) // BLOCK) * BLOCK
    slot = torch.arange(slots, device=plan.tier.device)
    position = torch.nn.functional.pad(plan.positions[0], (0, max(0, slots - plan.sequence_length)))[:, :slots].long()
    # A position past the sequence is out of every query's sight.
    seen_from = torch.where(slot < counts[:, None], position + window, FOREVER)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        far = i >= seen_from[b, j.clamp(max=slots - 1)]
        distance = i - (j - slots)
        return torch.where(j < slots, far, (distance >= 0) & (distance < window))

    length = plan.sequence_length
    return build_block_mask(visible, plan.batch_size, length, slots + length, plan.tier.device), position

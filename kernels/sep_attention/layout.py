"""Query blocks of the blocked backend: which keys each reads and where a mask is needed.

The special keys of a row are gathered once, tier by tier, so that what a block reads is one slice of them per tier and
one of the whole keys. Shape letters: S tokens of which the last Q are queries, C gathered special keys, R queries of a
block, L keys of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sep_attention.plan import AttentionPlan, effective_reach

# Masked columns closer together than this are masked as one run: one longer addition is cheaper than two short ones.
JOIN_RUNS = 64


class QueryBlock(NamedTuple):
    """Queries start..end-1 of a row.

    Attributes:
        far: (first, last) of each range of gathered keys the block reads, all of them before `local`.
        local: its other keys are local..end-1, which makes L in all.
        biases: (column, bias), bias [R, M] of 0 and -inf to add to columns column..column+M-1 of the scores.
    """

    start: int
    end: int
    far: list[tuple[int, int]]
    local: int
    biases: list[tuple[int, Tensor]]


class RowLayout(NamedTuple):
    """One sequence: `gathered` i64 [C], positions of its gathered keys, and its query blocks."""

    gathered: Tensor
    blocks: list[QueryBlock]


def block_layouts(
    plan: AttentionPlan, window: int, horizons: Sequence[int] | None, block_size: int, queries: int
) -> list[RowLayout]:
    """Layout of the last `queries` positions of each sequence of a plan on CPU.

    Kept on the plan for the other layers with this window.
    Raises ValueError for a window or horizon below 1 or a wrong count of horizons.
    """
    reach = effective_reach(plan, window, horizons)
    key = ("blocked", queries, window, *reach, block_size)
    if key not in plan.derived:
        rows = range(plan.batch_size)
        plan.derived[key] = [_row_layout(plan, row, window, reach, block_size, queries) for row in rows]
    return plan.derived[key]


def _row_layout(
    plan: AttentionPlan, row: int, window: int, reach: list[int], block_size: int, queries: int
) -> RowLayout:
    length = plan.sequence_length
    far = [tier for tier in range(plan.num_tiers) if window < min(reach[tier], length)]
    prefix = plan.prefix[far, row]
    counts = prefix[:, -1].tolist()
    gathered = [plan.positions[tier, row, :count].long() for tier, count in zip(far, counts, strict=True)]
    offsets = [sum(counts[:index]) for index in range(len(far))]

    starts = torch.arange(length - queries, length, block_size)
    floor = torch.zeros_like(starts) if plan.document_start is None else plan.document_start[row, starts].long()
    local = torch.maximum(starts - window + 1, floor)
    bounds = [torch.empty(0, len(starts), dtype=torch.int64)]
    for index, tier in enumerate(far):
        lowest = torch.minimum(torch.maximum(starts - reach[tier] + 1, floor), local)
        bounds.append(prefix[index][torch.stack((lowest, local))] + offsets[index])

    specials = torch.cat([torch.empty(0, dtype=torch.int64), *gathered])
    reach_of_key = torch.tensor([window, *reach])[plan.tier[row].long()]
    document = torch.zeros(length, dtype=torch.int32) if plan.document_start is None else plan.document_start[row]
    blocks = []
    for start, near, ranges in zip(starts.tolist(), local.tolist(), torch.cat(bounds).T.tolist(), strict=True):
        end = min(start + block_size, length)
        pairs = [(first, last) for first, last in zip(ranges[::2], ranges[1::2], strict=True) if first < last]
        keys = torch.cat([specials[first:last] for first, last in pairs] + [torch.arange(near, end)])
        blocks.append(QueryBlock(start, end, pairs, near, _biases(start, end, keys, reach_of_key, document)))
    return RowLayout(specials, blocks)


def _biases(start: int, end: int, keys: Tensor, reach: Tensor, document: Tensor) -> list[tuple[int, Tensor]]:
    """Bias of every run of columns that not all queries of the block see."""
    seen_by_all = (keys <= start) & (end - 1 - keys < reach[keys]) & (keys >= document[end - 1])
    partly = (~seen_by_all).nonzero().flatten()
    if not len(partly):
        return []
    breaks = (partly.diff() > JOIN_RUNS).nonzero().flatten()
    firsts = [int(partly[0]), *partly[breaks + 1].tolist()]
    lasts = [*partly[breaks].tolist(), int(partly[-1])]
    queries = torch.arange(start, end)[:, None]
    biases = []
    for first, last in zip(firsts, lasts, strict=True):
        run = keys[first : last + 1]
        hidden = (queries < run) | (queries - run >= reach[run]) | (run < document[start:end, None])
        biases.append((first, torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))))
    return biases

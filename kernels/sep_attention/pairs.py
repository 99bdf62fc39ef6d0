"""Exact counts of visible (query, key) pairs from prefix counts: O(S * T), never S x S."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sep_attention.plan import AttentionPlan, effective_reach


def keys_per_query(plan: AttentionPlan, window: int, horizons: Sequence[int] | None = None) -> Tensor:
    """i64 [B, S]: how many keys each query sees, itself included.

    The window holds `i - max(i - window + 1, d) + 1` keys, d being the start of the query's document; before it
    tier t adds `prefix_t[window start] - prefix_t[max(i - R_t + 1, d)]`. Raises ValueError for a window or horizon
    below 1 or a wrong count of horizons. No host sync.
    """
    reach = effective_reach(plan, window, horizons)
    position = torch.arange(plan.sequence_length, device=plan.tier.device)
    floor = torch.zeros_like(plan.tier, dtype=torch.int64) if plan.document_start is None else plan.document_start
    window_start = torch.maximum(position - window + 1, floor)
    count = position - window_start + 1
    for prefix, horizon in zip(plan.prefix, reach, strict=True):
        if horizon > window:
            horizon_start = torch.maximum(position - horizon + 1, floor)
            count = count + prefix.gather(1, window_start.long()) - prefix.gather(1, horizon_start.long())
    return count.long()


def attended_pairs(plan: AttentionPlan, window: int, horizons: Sequence[int] | None = None) -> Tensor:
    """i64 [B]: visible (query, key) pairs of each sequence; the sum of `keys_per_query`, with the same errors."""
    return keys_per_query(plan, window, horizons).sum(-1)

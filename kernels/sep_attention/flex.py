"""FlexAttention with the plan's mask: exact, and the rival that skips blocks instead of gathering keys."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from sep_attention.plan import AttentionPlan, effective_reach


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def block_mask(
    plan: AttentionPlan, window: int, horizons: Sequence[int] | None = None, queries: int | None = None
) -> BlockMask:
    """FlexAttention's mask of a layer for the last `queries` positions (None: all of them).

    Kept on the plan so that layers with the same window share it.
    """
    length = plan.sequence_length
    queries = queries or length
    reach_of_tier = [window, *effective_reach(plan, window, horizons)]
    key = ("flex", queries, *reach_of_tier)
    if key not in plan.derived:
        reach = torch.tensor(reach_of_tier, device=plan.tier.device)[plan.tier.long()]
        document = torch.zeros_like(plan.tier) if plan.document_start is None else plan.document_start

        def visible(batch: Tensor, head: Tensor, row: Tensor, j: Tensor) -> Tensor:
            i = row + (length - queries)
            return (i >= j) & (i - j < reach[batch, j]) & (document[batch, i] == document[batch, j])

        plan.derived[key] = create_block_mask(
            visible, plan.batch_size, None, queries, length, device=str(plan.tier.device)
        )
    return plan.derived[key]


def flex_sep_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    window: int,
    horizons: Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """q [B, H, Q, D] of the last Q positions on k, v [B, N, S, D] through FlexAttention; returns [B, H, Q, D].

    Compiled on a GPU; on CPU the library's own unfused form, whose backward is refused by `op.select_backend`.
    """
    mask = block_mask(plan, window, horizons, q.shape[2])
    grouped = q.shape[1] != k.shape[1]
    if q.is_cuda:
        return _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")
        return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)

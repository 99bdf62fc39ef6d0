"""The naive oracle: a dense mask and a plain softmax. Slow and obvious; every backend is held to it.

Shape letters: B sequences, H query heads, N key-value heads, G = H / N, S tokens of which the last Q are queries,
D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sep_attention.plan import AttentionPlan, effective_reach


def visible_mask(
    plan: AttentionPlan, window: int, horizons: Sequence[int] | None = None, queries: int | None = None
) -> Tensor:
    """bool [B, Q, S]: True where query i (second to last axis) sees key j (last axis).

    queries: Q, the last positions that ask; all S when None.

    Key j is visible iff it is in the same document (when documents are separated) and
    `0 <= i - j < max(window, R(j))`, R(j) being the horizon of j's tier and 0 for ordinary tokens.
    Raises ValueError for a window or horizon below 1 or a wrong count of horizons.
    """
    reach = torch.tensor([window, *effective_reach(plan, window, horizons)], device=plan.tier.device)
    position = torch.arange(plan.sequence_length, device=plan.tier.device)
    first = 0 if queries is None else plan.sequence_length - queries
    distance = position[first:, None] - position
    visible = (distance >= 0) & (distance < reach[plan.tier.long()][:, None, :])
    if plan.document_start is not None:
        visible &= plan.document_start[:, first:, None] == plan.document_start[:, None, :]
    return visible


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    window: int,
    horizons: Sequence[int] | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Separator attention through a dense S x S mask, in the dtype of q (float64 included) or that of a wider sink.

    Args:
        q: [B, H, Q, D], the queries of the last Q positions.
        k, v: [B, N, S, D], H a multiple of N.
        plan, window, horizons: what is visible, see `visible_mask`.
        sink: [H], logit of an extra softmax column that carries no value.
        scale: multiplies q @ k^T; D ** -0.5 when None.

    Returns [B, H, Q, D]. Raises what `visible_mask` raises.
    """
    given = q.dtype
    if sink is not None:
        # A sink in full precision is not rounded to half, nor is its gradient, a sum over all queries.
        q, k, v = (tensor.to(torch.promote_types(given, sink.dtype)) for tensor in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    visible = visible_mask(plan, window, horizons, q.shape[2])[:, None]
    scores = scores.masked_fill(~visible, float("-inf"))
    if sink is not None:
        column = sink.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), dim=-1)
    return (scores.softmax(-1)[..., : k.shape[2]] @ v).to(given)

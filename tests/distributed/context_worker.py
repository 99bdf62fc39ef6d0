"""Attention on context-parallel ranks against the same attention on whole sequences; run through distributed_runner."""

from __future__ import annotations

import torch
import torch.distributed as dist
from sep_attention import FOREVER, AttentionPlan, build_plan, sep_attention
from torch import Tensor

from sepllm_train.distributed.context import ContextGroup, ContextPlan, fetch_keys, keys_sent, part_of
from sepllm_train.model.pattern import LayerPattern

LENGTH, HEADS, KV_HEADS, WIDTH = 96, 4, 2, 8
# Name -> (layer, tiers, density of special keys, length of documents or None, batch).
CASES: dict[str, tuple[LayerPattern, int, float, int | None, int]] = {
    "separators": (LayerPattern(5, (FOREVER,)), 1, 0.12, None, 2),
    "the token itself": (LayerPattern(1, (FOREVER,)), 1, 0.3, None, 1),
    "window of a chunk": (LayerPattern(LENGTH // 4, (FOREVER,)), 1, 0.12, None, 1),
    "window of most": (LayerPattern(70, (FOREVER,)), 1, 0.12, None, 2),
    "full": (LayerPattern(FOREVER, (FOREVER,)), 1, 0.12, None, 2),
    "no special key": (LayerPattern(7, (FOREVER,)), 1, 0.0, None, 2),
    "special keys only": (LayerPattern(7, (FOREVER,)), 1, 1.0, None, 2),
    "documents": (LayerPattern(9, (FOREVER,)), 1, 0.2, 23, 3),
    "documents of a token": (LayerPattern(9, (FOREVER,)), 1, 0.2, 1, 1),
    "full in documents": (LayerPattern(FOREVER, (FOREVER,)), 1, 0.2, 41, 2),
    "tiers": (LayerPattern(4, (FOREVER, 30, 11)), 3, 0.4, None, 2),
    "tiers in documents": (LayerPattern(4, (FOREVER, 30, 11)), 3, 0.4, 37, 2),
}


def compare_all() -> dict[str, dict[str, dict[str, float]]]:
    """`compare` of every case: {"4": among all four ranks, "2": among the first and the last two}."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pair, _ = dist.new_subgroups(group_size=2)
    groups = {"4": ContextGroup(rank, 4, dist.group.WORLD), "2": ContextGroup(rank % 2, 2, pair)}
    results = {
        size: {name: compare(number, group, *case) for number, (name, case) in enumerate(CASES.items())}
        for size, group in groups.items()
    }
    dist.barrier()
    dist.destroy_process_group()
    return results


def compare(
    seed: int,
    group: ContextGroup,
    layer: LayerPattern,
    tiers: int,
    density: float,
    document: int | None,
    batch: int,
) -> dict[str, float]:
    """Largest errors of output and gradients on this rank in float64, of bfloat16 gradients, and bytes against plan."""
    whole, tensors, weights = _case(seed, tiers, density, document, batch)
    expected, grads = _attend_whole(tensors, weights, whole, layer)
    group.take_sent_bytes()
    found, parts = _attend_part(tensors, weights, ContextPlan(whole, group, "cpu"), layer)
    errors = [_error(found, expected, group)] + [_error(*pair, group) for pair in zip(parts, grads, strict=True)]
    sent = group.take_sent_bytes()
    halves = [tensor.bfloat16() for tensor in tensors]
    _, rounded = _attend_whole([tensor.double() for tensor in halves], weights, whole, layer)
    _, half = _attend_part(halves, weights, ContextPlan(whole, group, "cpu"), layer)
    pairs = zip(half, rounded, strict=True)
    planned = keys_sent(whole, min(layer.reach, LENGTH), group.size)
    moved = int(planned[group.rank].sum() + planned[:, group.rank].sum())
    return {
        "output": errors[0],
        "gradients": max(errors[1:]),
        "half": max(_error(mine, all_, group) / max(1.0, float(all_.abs().max())) for mine, all_ in pairs),
        "sent_bytes": sent,
        "planned_bytes": moved * 2 * KV_HEADS * WIDTH * 8,
    }


def _case(
    seed: int, tiers: int, density: float, document: int | None, batch: int
) -> tuple[AttentionPlan, list[Tensor], Tensor]:
    """Plan, [q, k, v] as [S, B, heads, D] and weights of the outputs: the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    special = torch.rand(batch, LENGTH, generator=generator) < density
    tier = (torch.randint(1, tiers + 1, (batch, LENGTH), generator=generator) * special).to(torch.uint8)
    starts = None
    if document is not None:
        # Each row's documents begin elsewhere.
        places = torch.arange(LENGTH) + 5 * torch.arange(batch)[:, None]
        starts = (torch.arange(LENGTH) - places % document).clamp(min=0)
    plan = build_plan(tier, initial_tokens=2, document_start=starts, num_tiers=tiers)
    shapes = [(LENGTH, batch, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, weights = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return plan, [q, k, v], weights


def _attend_whole(
    tensors: list[Tensor], weights: Tensor, plan: AttentionPlan, layer: LayerPattern
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output [S, B, H, D] and the gradients of q, k and v, computed without context parallelism."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    q, k, v = (leaf.permute(1, 2, 0, 3) for leaf in leaves)
    out = sep_attention(q, k, v, plan, window=layer.window, horizons=layer.horizons, backend="reference")
    out = out.permute(2, 0, 1, 3)
    return out.detach(), torch.autograd.grad((out * weights).sum(), leaves)


def _attend_part(
    tensors: list[Tensor], weights: Tensor, plan: ContextPlan, layer: LayerPattern
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output [L, B, H, D] of this rank's queries and the gradients of its q, k and v."""
    leaves = [_part(tensor, plan.group).requires_grad_() for tensor in tensors]
    fetched = fetch_keys(leaves[1], leaves[2], plan.exchange(layer.reach), plan.group)
    chunks = zip(leaves[0].chunk(2), fetched, strict=True)
    outputs = [
        sep_attention(q.permute(1, 2, 0, 3), k, v, chunk.plan, window=layer.window, horizons=layer.horizons)
        for q, (chunk, k, v) in chunks
    ]
    out = torch.cat([output.permute(2, 0, 1, 3) for output in outputs])
    return out.detach(), torch.autograd.grad((out * _part(weights, plan.group)).sum(), leaves)


def _part(tensor: Tensor, group: ContextGroup) -> Tensor:
    """This rank's part [L, B, ...] of [S, B, ...]."""
    return part_of(tensor.transpose(0, 1), group.rank, group.size).transpose(0, 1).contiguous()


def _error(found: Tensor, expected: Tensor, group: ContextGroup) -> float:
    """Largest difference of this rank's part from the whole."""
    return float((found.double() - _part(expected, group)).abs().max())

"""The plan of a micro-batch in one kernel on its device.

Shape letters: B sequences, S tokens, T tiers.
"""

# The compiler types the arguments of kernels, anew for each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sep_attention.triton.tuning import FP_FUSION

BLOCK = 4096


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _tier_of(TIER, DOCUMENT_START, row, position, S, initial_tokens, DOCUMENTS: tl.constexpr):
    """Tier [BLOCK] of each token once initial tokens have joined tier 1; 0 past the sequence."""
    inside = position < S
    tier = tl.load(TIER + row + position, mask=inside, other=0)
    offset = position
    if DOCUMENTS:
        offset = position - tl.load(DOCUMENT_START + row + position, mask=inside, other=0)
    return tl.where(inside & (offset < initial_tokens), 1, tier)


@triton.jit
def _ends_of_documents(DOCUMENT_START, DOCUMENT_END, row, S, SIZE: tl.constexpr):
    end = S
    for block in tl.range(tl.cdiv(S, SIZE) - 1, -1, -1):
        position = block * SIZE + tl.arange(0, SIZE)
        following = tl.load(DOCUMENT_START + row + position + 1, mask=position + 1 < S, other=0)
        boundary = tl.where(following == position + 1, position + 1, end)
        ends = tl.associative_scan(boundary, 0, _smaller, reverse=True)
        tl.store(DOCUMENT_END + row + position, ends, mask=position < S)
        end = tl.min(ends, 0)


@triton.jit(do_not_specialize=["B", "S", "initial_tokens"])
def plan_kernel(
    TIER,
    DOCUMENT_START,
    TIER_OUT,
    PREFIX,
    POSITIONS,
    DOCUMENT_END,
    B,
    S,
    initial_tokens,
    T: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One program for each sequence and tier, and one more for the ends of a sequence's documents."""
    sequence = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1)
    row = sequence * S
    if index == T:
        _ends_of_documents(DOCUMENT_START, DOCUMENT_END, row, S, SIZE)
    else:
        plane = index * B + sequence
        count = 0
        for start in tl.range(0, S, SIZE):
            position = start + tl.arange(0, SIZE)
            tier = _tier_of(TIER, DOCUMENT_START, row, position, S, initial_tokens, DOCUMENTS)
            member = (tier == index + 1).to(tl.int32)
            before = count + tl.cumsum(member, 0) - member
            if index == 0:
                tl.store(TIER_OUT + row + position, tier, mask=position < S)
            tl.store(PREFIX + plane * (S + 1) + position, before, mask=position < S)
            tl.store(POSITIONS + plane * S + before, position, mask=member != 0)
            count += tl.sum(member, 0)
        tl.store(PREFIX + plane * (S + 1) + S, count)
        for start in tl.range(count // SIZE * SIZE, S, SIZE):
            slot = start + tl.arange(0, SIZE)
            tl.store(POSITIONS + plane * S + slot, tl.zeros_like(slot), mask=(slot >= count) & (slot < S))


def plan_tensors(
    tier: Tensor, initial_tokens: int, document_start: Tensor | None, num_tiers: int, *, block: int = BLOCK
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Tier u8 [B, S], prefix i32 [T, B, S+1] and positions i32 [T, B, S] as `AttentionPlan` defines them, and
    i32 [B, S], the position after the last token of each token's document, None without document starts.

    Args:
        tier: u8 [B, S].
        initial_tokens: tokens of each document (or of the sequence) that join tier 1.
        document_start: i32 [B, S] or None.
        num_tiers: T.
        block: tokens a program takes at a time, a power of two.

    Deterministic, without a host sync.
    """
    batch, length = tier.shape
    tier = tier.contiguous()
    new_tier = torch.empty_like(tier)
    prefix = torch.empty(num_tiers, batch, length + 1, dtype=torch.int32, device=tier.device)
    positions = torch.empty(num_tiers, batch, length, dtype=torch.int32, device=tier.device)
    starts = positions if document_start is None else document_start.contiguous()
    ends = None if document_start is None else torch.empty_like(starts)
    plan_kernel[(batch, num_tiers + (ends is not None))](
        tier,
        starts,
        new_tier,
        prefix,
        positions,
        positions if ends is None else ends,
        batch,
        length,
        initial_tokens,
        T=num_tiers,
        DOCUMENTS=ends is not None,
        SIZE=min(block, triton.next_power_of_2(length)),
        num_warps=8,
        **FP_FUSION,
    )
    return new_tier, prefix, positions, ends

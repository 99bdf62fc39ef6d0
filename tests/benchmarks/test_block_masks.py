"""FlexAttention's masks are those of the library, and the baselines compute what ours does."""

from __future__ import annotations

import pytest
import torch
from sep_attention import AttentionPlan, build_plan, reference_attention, visible_mask
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.attention.baselines import baselines_of, flex_gathered, flex_masked
from benchmarks.attention.block_masks import gathered_mask, plan_mask


def _plan(batch: int, length: int) -> AttentionPlan:
    generator = torch.Generator().manual_seed(length)
    return build_plan(torch.rand(batch, length, generator=generator) < 0.15, initial_tokens=3)


@pytest.mark.parametrize("length", [100, 256, 700])
def test_blocks_are_those_of_the_library(length: int) -> None:
    plan = _plan(2, length)
    for ours in (plan_mask(plan, 64), gathered_mask(plan, 64)[0]):
        queries, keys = ours.seq_lengths
        theirs = create_block_mask(ours.mask_mod, 2, None, queries, keys, device="cpu")
        for name in ("kv_num_blocks", "full_kv_num_blocks"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert torch.equal(ours.to_dense(), theirs.to_dense())


def test_gathered_keys_hold_each_visible_pair_once() -> None:
    length, window = 300, 40
    plan = _plan(2, length)
    mask, position = gathered_mask(plan, window)
    slots = position.shape[1]
    b, i, j = (torch.arange(count) for count in (2, length, slots + length))
    seen = mask.mask_mod(b[:, None, None], b[:, None, None], i[:, None], j)
    sources = torch.cat((position, torch.arange(length).expand(2, -1)), 1)
    counts = torch.zeros(2, length, length).scatter_add_(2, sources[:, None].expand(-1, length, -1), seen.float())
    assert torch.equal(counts, visible_mask(plan, window).float())


@pytest.mark.parametrize("make", [flex_masked, flex_gathered])
def test_flex_baselines_compute_the_pattern(make) -> None:  # type: ignore[no-untyped-def]
    plan = _plan(1, 200)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 200, 32), torch.randn(1, 2, 200, 32), torch.randn(1, 2, 200, 32)
    torch.testing.assert_close(make(plan, 30)(q, k, v), reference_attention(q, k, v, plan, window=30))
    with pytest.raises(NotImplementedError, match="no backward pass on CPU"):
        make(plan, 30)(q.requires_grad_(), k, v)


def test_flash_attn_that_is_missing_says_so() -> None:
    baselines = baselines_of(torch.device("cuda"))
    assert [name for name, baseline in baselines.items() if baseline.sparse] == ["ours", "flex", "flex gathered"]
    with pytest.raises(ImportError, match="flash_attn_interface"):
        baselines["flash-attn 3"].make(_plan(1, 8), 4)

"""The plan's contents and the exact pair counts that follow from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from sep_attention import FOREVER, AttentionPlan, attended_pairs, build_plan, keys_per_query, visible_mask

from tests.attention.attention_cases import Case, cases


def test_plan_of_a_sentence() -> None:
    tier = torch.tensor([[0, 0, 2, 0, 1, 0, 2]], dtype=torch.uint8)
    plan = build_plan(tier, initial_tokens=1, num_tiers=2)
    assert plan.tier.tolist() == [[1, 0, 2, 0, 1, 0, 2]]
    assert plan.positions.tolist() == [[[0, 4, 0, 0, 0, 0, 0]], [[2, 6, 0, 0, 0, 0, 0]]]
    assert plan.prefix.tolist() == [[[0, 1, 1, 1, 1, 2, 2, 2]], [[0, 0, 0, 1, 1, 1, 1, 2]]]
    assert (plan.num_tiers, plan.batch_size, plan.sequence_length) == (2, 1, 7)
    assert tier.tolist() == [[0, 0, 2, 0, 1, 0, 2]], "the caller's tensor was changed"


def test_initial_tokens_restart_with_each_document() -> None:
    starts = torch.tensor([[0, 0, 0, 3, 3, 3, 3]])
    plan = build_plan(torch.zeros(1, 7, dtype=torch.bool), initial_tokens=2, document_start=starts)
    assert plan.tier.tolist() == [[1, 1, 0, 1, 1, 0, 0]]
    assert plan.document_start is not None and plan.document_start.dtype == torch.int32


def test_initial_tokens_move_to_the_first_tier() -> None:
    plan = build_plan(torch.full((1, 3), 2, dtype=torch.uint8), initial_tokens=2, num_tiers=2)
    assert plan.tier.tolist() == [[1, 1, 2]]


@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_prefix_and_positions_agree_with_tiers(case: Case) -> None:
    plan = case.plan()
    for tier in range(1, plan.num_tiers + 1):
        for row in range(plan.batch_size):
            members = (plan.tier[row] == tier).nonzero().flatten()
            assert plan.positions[tier - 1, row, : len(members)].tolist() == members.tolist()
            assert not plan.positions[tier - 1, row, len(members) :].any()
            below = [int((members < i).sum()) for i in range(case.length + 1)]
            assert plan.prefix[tier - 1, row].tolist() == below


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_counts_match_brute_force(case: Case) -> None:
    plan = case.plan()
    mask = visible_mask(plan, case.window, case.horizons)
    assert torch.equal(keys_per_query(plan, case.window, case.horizons), mask.sum(2))
    pairs = attended_pairs(plan, case.window, case.horizons)
    assert torch.equal(pairs, mask.sum((1, 2)))
    assert pairs.dtype == torch.int64


def test_mask_of_the_paper() -> None:
    """a = 1, n = 2, one separator at 3: written out by hand."""
    tier = torch.tensor([[0, 0, 0, 1, 0, 0, 0]], dtype=torch.uint8)
    expected = ["1......", "11.....", "111....", "1.11...", "1..11..", "1..111.", "1..1.11"]
    mask = visible_mask(build_plan(tier, initial_tokens=1), 2)
    assert ["".join(".1"[seen] for seen in row) for row in mask[0].tolist()] == expected


def test_full_causal_count_of_a_long_sequence_is_exact() -> None:
    length = 131_072
    plan = build_plan(torch.zeros(1, length, dtype=torch.uint8))
    assert attended_pairs(plan, length).tolist() == [length * (length + 1) // 2]
    assert attended_pairs(plan, FOREVER).tolist() == [length * (length + 1) // 2]


def test_moving_to_its_own_device_is_free() -> None:
    plan = Case().plan()
    assert plan.to("cpu") is plan
    assert plan.to("meta").tier.device.type == "meta"


def test_building_needs_no_data_on_the_host() -> None:
    """Meta tensors have no contents: whatever read one here would stall a GPU."""
    tier = torch.zeros(2, 9, dtype=torch.uint8, device="meta")
    starts = torch.zeros(2, 9, dtype=torch.int32, device="meta")
    plan = build_plan(tier, initial_tokens=2, document_start=starts, num_tiers=3)
    assert attended_pairs(plan, 4, [9, 8, FOREVER]).shape == (2,)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"tier": torch.zeros(2, 5)}, "uint8 or bool, got torch.float32"),
        ({"tier": torch.zeros(5, dtype=torch.uint8)}, r"\[B, S\] with S >= 1, got \[5\]"),
        ({"tier": torch.zeros(2, 0, dtype=torch.uint8)}, r"got \[2, 0\]"),
        ({"num_tiers": 5}, "num_tiers must be 1..4, got 5"),
        ({"num_tiers": 0}, "num_tiers must be 1..4, got 0"),
        ({"initial_tokens": -1}, "at least 0, got -1"),
        ({"tier": torch.full((2, 5), 3, dtype=torch.uint8)}, "tier holds 3 but num_tiers is 1"),
        ({"document_start": torch.zeros(2, 4, dtype=torch.int32)}, r"\[2, 5\], got torch.int32 \[2, 4\]"),
        ({"document_start": torch.zeros(2, 5)}, "got torch.float32"),
    ],
)
def test_bad_input_to_build_plan(arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build_plan(**{"tier": torch.zeros(2, 5, dtype=torch.uint8)} | arguments)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("prefix", torch.zeros(1, 2, 5, dtype=torch.int32), r"plan.prefix must be torch.int32 \[1, 2, 6\]"),
        ("positions", torch.zeros(1, 2, 5), r"plan.positions must be torch.int32 \[1, 2, 5\], got torch.float32"),
        ("document_start", torch.zeros(1, 5, dtype=torch.int32), r"plan.document_start must be torch.int32 \[2, 5\]"),
        ("prefix", torch.zeros(1, 2, 6, dtype=torch.int32, device="meta"), "plan.prefix is on meta but plan.tier is"),
    ],
)
def test_bad_input_to_the_plan_itself(name: str, value: torch.Tensor, sentence: str) -> None:
    plan = build_plan(torch.zeros(2, 5, dtype=torch.uint8))
    parts = {"tier": plan.tier, "prefix": plan.prefix, "positions": plan.positions}
    with pytest.raises(ValueError, match=sentence):
        AttentionPlan(**parts | {name: value})

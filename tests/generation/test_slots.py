"""Bookkeeping of caches and patterns by token ids, without any model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sep_attention import FOREVER, visible_mask

from data_prep.tokenizers import load_tokenizer
from sepllm_train.config.schema import AttentionConfig
from sepllm_train.generation.pattern import TokenPattern, separator_ids
from sepllm_train.generation.slots import SLACK, CachePolicy, Slots
from sepllm_train.model.pattern import resolve_pattern

CPU = torch.device("cpu")


def kept(positions: list[int], reach: list[int], policy: CachePolicy) -> list[int]:
    """Positions that stay before a token at len(reach) comes, by the definition; reach is that of every position."""
    now = len(reach)
    window = [at for at in positions if now - at < policy.window]
    initial = [at for at in positions if at < policy.initial and at not in window]
    beyond = [at for at in positions if at not in window and at not in initial and reach[at] > now - at]
    if policy.separators is not None:
        beyond = beyond[max(0, len(beyond) - policy.separators) :]
    return sorted({*window, *initial, *beyond})


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_slots_keep_what_the_definition_keeps(data: st.DataObject) -> None:
    initial, separators, window = (data.draw(st.integers(least, 6)) for least in (0, 0, 1))
    capacity = initial + separators + window + data.draw(st.integers(1, 9))
    policy = CachePolicy(window, initial, separators, capacity)
    rows = data.draw(st.integers(1, 3))
    late = [data.draw(st.integers(0, 20)) for _ in range(rows)]
    slots = Slots.empty(policy, rows, CPU)
    held: list[list[int]] = [[] for _ in range(rows)]
    reach: list[list[int]] = [[] for _ in range(rows)]
    for step in range(50):
        if bool(slots.full().any()):
            slots, order = slots.drop()
            assert order.shape[1] == slots.width
        valid = torch.tensor([[step >= start] for start in late])
        new = [data.draw(st.sampled_from([0, 0, 5, FOREVER])) for _ in range(rows)]
        for row in range(rows):
            if step < late[row]:
                continue
            if len(held[row]) >= capacity:
                held[row] = kept(held[row], reach[row], policy)
            held[row].append(len(reach[row]))
            reach[row].append(new[row])
        slots = slots.append(torch.tensor(new)[:, None], valid)
        for row in range(rows):
            found = slots.position[row]
            assert found[found >= 0].tolist() == held[row]
            assert found[: slots.width - len(held[row])].tolist() == [-1] * (slots.width - len(held[row]))
            assert slots.length[row] == len(held[row]) <= capacity
    assert torch.equal(slots.select(torch.tensor([0])).position[0], slots.position[0])


def test_taking_back() -> None:
    policy = CachePolicy(4, 1, 2, 12)
    valid = torch.tensor([[False, True, True, True], [True] * 4])
    before = Slots.empty(policy, 2, CPU).append(torch.zeros(2, 4, dtype=torch.int64), valid)
    after = before.append(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)).without_last(3)
    for name in ("length", "seen", "position", "reach"):
        assert torch.equal(getattr(after, name), getattr(before, name)), name


def test_a_growing_cache_drops_in_pieces() -> None:
    slots = Slots.empty(CachePolicy(5, 2), 1, CPU)
    longest = 0
    for position in range(3000):
        if bool(slots.full().any()):
            slots, _ = slots.drop()
        reach = FOREVER if position % 100 == 0 else 0
        slots = slots.append(torch.tensor([[reach]]), torch.ones(1, 1, dtype=torch.bool))
        longest = max(longest, int(slots.length))
    assert longest <= 30 + 2 + 5 + SLACK + 1
    assert set(range(0, 3000, 100)) <= set(slots.position[0].tolist())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"window": 8, "separators": 4}, "separators=4 needs a capacity above initial"),
        ({"window": 8, "capacity": 20}, "capacity=20 needs a number of separators to keep"),
        ({"window": 8, "separators": 4, "capacity": 12}, "is 12, and capacity=12 must be larger: at least 13"),
        ({"window": 0}, "window=0 must be a whole number of at least 1"),
        ({"window": 2.5}, "window=2.5 must be a whole number"),
    ],
)
def test_policies_that_do_not_fit(sizes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CachePolicy(**sizes)


def test_mean_length_by_the_papers_formula() -> None:
    assert CachePolicy(256, 4, 64, 800).mean_length == 562
    assert CachePolicy(256, 4).mean_length is None


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_plan_and_reach_show_the_same_keys(data: st.DataObject) -> None:
    """The mask of a plan, and that of slots which drop nothing."""
    tier = torch.tensor([data.draw(st.integers(0, 2)) for _ in range(10)], dtype=torch.uint8)
    interval = data.draw(st.sampled_from([None, None, 4]))
    pattern = TokenPattern((3,), data.draw(st.integers(0, 3)), (FOREVER, 7), tier, interval)
    length, padding = 30, data.draw(st.integers(0, 12))
    ids = torch.tensor([[data.draw(st.integers(0, 9)) for _ in range(length)]])
    valid = (torch.arange(length) >= padding)[None]
    mask = visible_mask(pattern.plan(ids, valid), 3, pattern.horizons)[0, padding:, padding:]
    slots = Slots.empty(CachePolicy(3, pattern.initial), 1, CPU)
    slots = slots.append(pattern.reach(ids, valid.cumsum(1) - 1), valid)
    assert torch.equal(slots.visible(length)[0, padding:, padding:], mask)


def test_pattern_of_a_run_survives_json() -> None:
    attention = AttentionConfig(window=[4, 8], full_layers=[1], separators=[{"classes": ["period"], "horizon": 40}])
    classes = np.array([0, 1, 2, 3, 1], dtype=np.uint8)
    pattern = TokenPattern.of_run(resolve_pattern(attention, 2), classes, 3)
    again = TokenPattern.from_dict(pattern.to_dict())
    assert again.to_dict() == pattern.to_dict()
    assert again.windows == (4, FOREVER) and again.separators == [1, 4] and again.end_of_document is None
    with pytest.raises(ValueError, match="the separator pattern cannot be read"):
        TokenPattern.from_dict({**pattern.to_dict(), "tiers": [{"tokens": [99]}]})
    for key, value in (("interval", 0), ("end_of_document", -1), ("vocabulary", 0), ("windows", [None, -1])):
        with pytest.raises(ValueError, match="the separator pattern cannot be read"):
            TokenPattern.from_dict({**pattern.to_dict(), key: value})
    with pytest.raises(ValueError, match="format 9 is not 1"):
        TokenPattern.from_dict({**pattern.to_dict(), "format": 9})


def test_the_papers_nine_ids(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "20B_tokenizer.json")
    assert separator_ids(tokenizer) == sorted([15, 13, 32, 2, 28, 27, 209, 186, 187])


def test_a_tokenizer_without_separators(tmp_path: Path) -> None:
    import tokenizers

    path = tmp_path / "tokenizer.json"
    model = tokenizers.models.WordLevel({"word": 0, "</s>": 1}, unk_token="word")
    made = tokenizers.Tokenizer(model)
    made.add_special_tokens(["</s>"])
    made.save(str(path))
    with pytest.raises(ValueError, match="has no separators among paper: choose other classes, or give separator ids"):
        separator_ids(load_tokenizer(path))

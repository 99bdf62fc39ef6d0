"""What is counted as seen is what the mask shows and what a running cache holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from sep_attention import FOREVER, visible_mask

from sepllm_train.evaluation.attention import Attention, bind
from sepllm_train.evaluation.shares import Scored, Shares, keys_seen
from sepllm_train.evaluation.stream_model import Opened, open_model
from sepllm_train.generation.choice import AttentionChoice
from sepllm_train.hf import cache_argument
from sepllm_train.hf.separators import CONFIG_KEY

pytestmark = pytest.mark.filterwarnings("error:.*past_key_values.*:FutureWarning")

# Ids of single bytes, separators often among them.
ROWS = [[n * n % 29 for n in range(7 * start, 7 * start + length)] for start, length in ((1, 61), (5, 40), (9, 1))]


@pytest.fixture(scope="module")
def opened(models: dict[str, Path]) -> Opened:
    return open_model(str(models["sep"]), None, "fp32", "cpu")


PATTERNS = {
    "trained": AttentionChoice(),
    "wider": AttentionChoice(window=9, initial=0),
    "other-classes": AttentionChoice(classes="all"),
    "streaming": AttentionChoice("streaming"),
    "fixed": AttentionChoice("fixed", interval=4),
}


@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("first_full", [False, True])
def test_patterns_count_what_the_mask_shows(opened: Opened, options: AttentionChoice, first_full: bool) -> None:
    attention = bind(opened, options)
    assert attention.pattern is not None
    if first_full:
        windows = (FOREVER, *attention.pattern.windows[1:])
        attention = replace(attention, pattern=replace(attention.pattern, windows=windows))
    assert options.name != "pattern" or any(set(row) & set(attention.pattern.separators) for row in ROWS)
    kept = keys_seen(attention, ROWS)
    for row, counted in zip(ROWS, kept, strict=True):
        plan = attention.pattern.plan(torch.tensor([row]))
        shown = [visible_mask(plan, window, attention.pattern.horizons)[0] for window in attention.pattern.windows]
        assert counted[: len(row)] == pytest.approx(torch.stack(shown).double().sum(-1).mean(0).numpy())


CACHES: list[dict[str, Any]] = [
    {"separators": 5, "capacity": 20},
    {"separators": 5, "capacity": 15},
    {"separators": 8, "window": 12, "capacity": 30, "positions": "training"},
]


@pytest.mark.parametrize("numbers", CACHES, ids=str)
def test_caches_count_what_a_running_one_holds(opened: Opened, numbers: dict[str, Any]) -> None:
    attention = bind(opened, AttentionChoice("cache", **numbers))
    assert attention.generation_cache is not None
    kept = keys_seen(attention, ROWS)
    for row, counted in zip(ROWS, kept, strict=True):
        cache = attention.generation_cache()
        with torch.no_grad():
            opened.model(torch.tensor([row]), **{cache_argument(opened.model): cache})
        assert counted[: len(row)].mean() == pytest.approx(cache.mean_length)
        assert counted[len(row) - 1] == cache.lengths[0]


def test_sums_are_over_distinct_sequences(opened: Opened) -> None:
    """Twelve tokens, the prompt's last the eighth: with a window of six and no separators, by hand."""
    shares = Shares()
    attention = bind(opened, AttentionChoice("streaming", initial=0))
    one = Scored(list(range(270, 282)), prompt_end=7, first=7)
    shares.note(attention, [one, one])
    shares.note(attention, [one])
    found = shares.summary()
    assert found["sequences"] == 1
    assert found["attended_share"] == pytest.approx((21 + 6 * 6) / 78)
    assert found["kv_share_prompt"] == pytest.approx(6 / 8)
    assert found["kv_share"] == pytest.approx(5 * 6 / (8 + 9 + 10 + 11 + 12))
    nothing = {"sequences": 0, "attended_share": None, "kv_share_prompt": None, "kv_share": None}
    assert Shares().summary() == nothing


def test_full_attention_sees_all(opened: Opened) -> None:
    assert np.array_equal(keys_seen(bind(opened, AttentionChoice("dense")), ROWS)[1], np.arange(1, 62))


EVERY = (*PATTERNS.values(), AttentionChoice("cache", capacity=400))


def windows_of(attention: Attention) -> list[int]:
    assert attention.pattern is not None
    if attention.policies is not None:
        return [policy.window for policy in attention.policies]
    return list(attention.pattern.windows)


def test_full_layers_of_training_stay_full(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    trained_with(opened, monkeypatch, windows=[None, 6])
    for options in EVERY:
        assert windows_of(bind(opened, options)) == [FOREVER, options.window or 6]


def test_layers_keep_their_windows(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache has one for all, and says which."""
    trained_with(opened, monkeypatch, windows=[9, 6])
    for options in EVERY:
        attention = bind(opened, options)
        one = 9 if options.name == "cache" else options.window
        assert windows_of(attention) == ([9, 6] if one is None else [one] * 2)
        told = "the cache has one window for all layers, 9, the largest of 6/9" in attention.differences
        assert told == (options.name == "cache")


def test_documents_apart_alone_are_full_attention(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's numbers are taken then, and no layer stays full."""
    trained_with(opened, monkeypatch, windows=[None, None], end_of_document=0)
    for options in EVERY:
        assert windows_of(bind(opened, options)) == [options.window or 256] * 2


def trained_with(opened: Opened, monkeypatch: pytest.MonkeyPatch, **pattern: Any) -> None:
    """Let the model have been trained with another pattern."""
    trained = getattr(opened.model.config, CONFIG_KEY)
    monkeypatch.setattr(opened.model.config, CONFIG_KEY, trained | pattern)

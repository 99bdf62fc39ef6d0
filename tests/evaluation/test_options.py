"""Attentions as they are typed: baselines, and settings that do not apply."""

from __future__ import annotations

import pytest

from sepllm_train.base.errors import UserError
from sepllm_train.evaluation.options import baseline, with_baselines
from sepllm_train.generation.choice import ATTENTIONS, AttentionChoice, check_used

ASKED = AttentionChoice(window=9)


def test_a_baseline_takes_the_numbers_of_the_call_and_its_own() -> None:
    made = baseline(ASKED, "cache:capacity=40:classes=comma+period:positions=training")
    assert (made.name, made.window, made.capacity, made.classes) == ("cache", 9, 40, "comma,period")
    assert made.positions == "training" and made.label == "cache:capacity=40:classes=comma+period:positions=training"


@pytest.mark.parametrize(
    "asked, labels",
    [
        (ASKED, ["dense", "streaming", "fixed:interval=5"]),
        (AttentionChoice(interval=4), ["dense", "streaming", "fixed"]),
        (AttentionChoice("dense"), ["streaming", "fixed:interval=5"]),
        (AttentionChoice("fixed", interval=4), ["dense", "streaming"]),
    ],
    ids=["pattern", "interval", "dense", "fixed"],
)
def test_the_paper_s_baselines(asked: AttentionChoice, labels: list[str]) -> None:
    found = with_baselines(asked, ["paper", "cache:capacity=400"])
    assert found[0] == asked and [one.label for one in found[1:]] == [*labels, "cache:capacity=400"]
    assert {one.interval for one in found if one.name == "fixed"} == {asked.interval or 5}


def test_presets_have_the_published_numbers() -> None:
    made = {name: baseline(ASKED, name) for name in ("fixllm5", "fixllm4", "llama3")}
    assert {(one.initial, one.window) for one in made.values()} == {(3, 256)}
    assert [(one.name, one.interval, one.label) for one in made.values()] == [
        ("fixed", 5, "fixllm5"),
        ("fixed", 4, "fixllm4"),
        ("pattern", None, "llama3"),
    ]
    assert baseline(ASKED, "fixllm4:window=64").window == 64


@pytest.mark.parametrize(
    "text, sentence",
    [
        (
            "period",
            "the baseline 'period' is unknown: choose from .* or paper .* classes of a baseline are joined by +",
        ),
        (
            "dense:window=5",
            "'window=5' in the baseline dense:window=5 does not apply to dense, which takes no settings",
        ),
        ("fixllm6", "the baseline 'fixllm6' is unknown: .* the nearest is fixllm"),
        ("pattern:interval=4", "does not apply to pattern, which takes initial, window, classes"),
        ("streaming:classes=comma", "does not apply to streaming, which takes initial, window"),
        ("streaming:width=4", "'width=4' in the baseline streaming:width=4 does not apply to streaming"),
        ("streaming:window=-4", "is not KEY=VALUE with a whole number"),
        ("streaming:window=\u00b2", "is not KEY=VALUE with a whole number"),
        ("pattern:classes=", "is not KEY=VALUE with a text"),
    ],
)
def test_baselines_that_are_not_understood(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        baseline(ASKED, text)


def test_settings_that_do_not_apply() -> None:
    check_used(with_baselines(ASKED, ["fixed"]), ["window", "interval"], ATTENTIONS)
    with pytest.raises(UserError, match="--interval does not apply to pattern, dense: it is for fixed"):
        check_used(with_baselines(ASKED, ["dense"]), ["window", "interval"], ATTENTIONS)
    with pytest.raises(UserError, match="--window does not apply to dense: it is for pattern, streaming, fixed, cache"):
        check_used([AttentionChoice("dense")], ["window"], ATTENTIONS)

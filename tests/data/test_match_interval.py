"""sepllm match interval prints overrides of runs that keep as many keys; counts are those of the exact mask."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sep_attention import visible_mask

from sepllm_train.analysis.match import kept_keys, matching_interval, matching_window
from sepllm_train.base.errors import UserError
from sepllm_train.config.load import configuration_of
from sepllm_train.config.schema import AttentionConfig
from sepllm_train.model.pattern import AttentionPattern, resolve_pattern
from tests.support.command import program

LAYERS, LENGTH = 2, 150


@pytest.fixture(scope="module")
def text() -> dict[str, torch.Tensor]:
    """Three samples of 150 tokens in documents of uneven length, a fifth of them periods or commas."""
    draw = torch.Generator().manual_seed(3)
    marks = torch.rand(3, LENGTH, generator=draw)
    classes = torch.where(marks < 0.1, 1, torch.where(marks < 0.2, 2, 0)).to(torch.uint8)
    begins = torch.rand(3, LENGTH, generator=draw) < 0.02
    start = (begins * torch.arange(LENGTH)).cummax(1).values.int()
    return {"separator_class": classes, "document_start": start}


def shares(pattern: AttentionPattern, text: dict[str, torch.Tensor]) -> tuple[float, float, float]:
    """Kept at the last token, mean of the tokens' shares and attended share, from the masks."""
    plan = pattern.plan(text["separator_class"], text["document_start"])
    keys = torch.stack([visible_mask(plan, layer.window, layer.horizons).sum(2) for layer in pattern.layers]).double()
    share = keys / torch.arange(1, LENGTH + 1)
    return float(share[..., -1].mean()), float(share.mean()), float(keys.sum() / (6 * LENGTH * (LENGTH + 1) / 2))


CASES: list[dict[str, Any]] = [
    {"window": 16},
    {"window": [8, 40], "initial_tokens": 0},
    {"window": 16, "separators": ["comma"], "full_layers": "first"},
    {"window": 16, "separate_documents": True},
    {"window": LENGTH + 1},
]


@pytest.mark.parametrize("settings", CASES)
def test_nearest_interval_and_window_by_the_masks(settings: dict[str, Any], text: dict[str, torch.Tensor]) -> None:
    attention = AttentionConfig(**settings)
    wanted = shares(resolve_pattern(attention, LAYERS), text)
    found = kept_keys(resolve_pattern(attention, LAYERS), text)
    assert (found.last, found.mean, found.attended) == pytest.approx(wanted, rel=1e-12)
    for match, key, bare in (
        (matching_interval(attention, LAYERS, text), "interval", replace(attention, pattern="fixed", interval=1)),
        (matching_window(attention, LAYERS, text), "window", replace(attention, pattern="streaming")),
    ):
        every = range(1, LENGTH + 1)
        patterns = [resolve_pattern(replace(bare, **{key: value}), LAYERS) for value in every]
        kept = [kept_keys(pattern, text).last for pattern in patterns]
        assert kept[9] == pytest.approx(shares(patterns[9], text)[0], rel=1e-12)
        assert match.value == 1 + np.argmin(np.abs(np.round(np.array(kept) - wanted[0], 12)))
        assert (match.kept, match.wanted) == pytest.approx((kept[match.value - 1], wanted[0]), rel=1e-12)
        assert match.attention == replace(bare, **{key: match.value})


def test_only_separators_are_matched(text: dict[str, torch.Tensor]) -> None:
    for match in (matching_interval, matching_window):
        with pytest.raises(UserError, match=r"attention.pattern=sep, not to streaming"):
            match(AttentionConfig("streaming"), LAYERS, text)


run = program("match interval")


def test_overrides_are_of_runs_that_keep_as_many(sample_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["+experiment=demo_sep", "data.sequence_length=512", f"data.cache={sample_cache}"]
    run(["--samples", "24", *words, "attention.separators=[period,comma]"])
    *_, counted, found, fixed, streaming = capsys.readouterr().out.splitlines()
    separators, without = (float(share) for share in re.findall(r"([\d.]+)%", counted))
    interval, kept, before, kept_before, after, kept_after, window, kept_window = map(
        float, re.findall(r"\d+\.?\d*", found)
    )
    assert without < kept_after <= kept <= kept_before and (before, after) == (interval - 1, interval + 1)
    assert abs(kept - separators) <= min(abs(kept_before - separators), abs(kept_after - separators))
    assert kept_window == pytest.approx(separators, abs=100 / 512)
    fixed_run, streaming_run = (configuration_of([*words, *shlex.split(line)]) for line in (fixed, streaming))
    assert (fixed_run.attention.pattern, fixed_run.attention.interval) == ("fixed", interval)
    assert (streaming_run.attention.pattern, streaming_run.attention.window) == ("streaming", window)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--samples", "0"], "--samples 0 must be at least 1"),
        (["attention.separators=[dot]"], "unknown separator class 'dot'"),
        (["attention.window=0"], "attention.window=0 must be whole numbers of at least 1"),
        (["attention=fixed"], "matched to attention.pattern=sep, not to fixed"),
    ],
)
def test_mistake(
    sample_cache: Path,
    capsys: Any,
    words: list[str],
    sentence: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run([f"data.cache={sample_cache}", *words])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.startswith("error: ") and sentence in told and told.count("\n") == 1

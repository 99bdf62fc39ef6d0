"""Windows that are drawn for each step: what is drawn, counted, resumed and refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.config.schema import AttentionConfig, Config
from sepllm_train.errors import UserError
from sepllm_train.training.schedules import draw, schedule_of
from tests.distributed_runner import run_ranks
from tests.training.schedules_worker import train_and_count

CHOICES = [2, 4, 8, 16, 32]
# What seed 1234 draws in steps 1 to 12.
FIRST = [16, 4, 2, 32, 16, 4, 4, 2, 4, 8, 16, 4]


def test_draws_are_a_function_of_seed_and_step() -> None:
    # Fixed for all time: a run that is resumed under another Python must go on with the same windows.
    assert [draw(CHOICES, 1234, step) for step in range(1, 13)] == FIRST
    config = Config(attention=AttentionConfig(window_choices=CHOICES, full_layers="first"))
    schedule = schedule_of(config)
    assert [schedule.window(step) for step in range(1, 13)] == FIRST
    for step, window in enumerate(FIRST, 1):
        first, *others = schedule.pattern(step).layers
        assert first.full and {layer.window for layer in others} == {window}
    assert {layer.window for layer in schedule.base.layers[1:]} == {64}
    other = schedule_of(replace(config, seed=1235))
    assert [other.window(step) for step in range(1, 13)] != FIRST
    counts = Counter(draw(CHOICES, 7, step) for step in range(5000))
    # Binomial: 1000 expected, a standard deviation of 28.
    assert set(counts) == set(CHOICES) and all(abs(count - 1000) < 130 for count in counts.values())


def test_a_run_without_choices_has_one_pattern() -> None:
    schedule = schedule_of(Config(attention=AttentionConfig(window=[4] * 11 + [8])))
    assert schedule.window(3) is None and schedule.pattern(3) is schedule.base
    assert schedule.drawn_from == [schedule.base]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window_choices": []}, r"window_choices=\[\] must be at least two different whole numbers"),
        ({"window_choices": [4]}, r"window_choices=\[4\] must be at least two different"),
        ({"window_choices": [4, 4]}, r"window_choices=\[4, 4\] must be at least two different"),
        ({"window_choices": [0, 4]}, r"window_choices=\[0, 4\] must be .* of at least 1"),
        ({"window_choices": [4, 8], "pattern": "dense"}, "attention.pattern=dense has none"),
        ({"window_choices": [4, 8], "window": [4] * 12}, r"attention.window=\[4, .* must be one number too"),
        (
            {"window_choices": [1, 8], "placement": "preceding"},
            r"placement=preceding needs attention.window=64 and attention.window_choices=\[1, 8\] to be at least 2",
        ),
    ],
)
def test_refusals(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        AttentionConfig(**settings)


@pytest.fixture(scope="module")
def alone(sample_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs of one process, in one launch: one with drawn windows, and one that goes on from its second checkpoint."""
    root = tmp_path_factory.mktemp("schedules")
    settings = {
        "attention": {"window_choices": CHOICES, "full_layers": "first"},
        "training": {"steps": 4, "validation_interval": 2, "validation_samples": 2},
    }
    runs = [
        {"name": "drawn", **settings},
        {"name": "drawn again", "resume": str(root / "drawn" / "checkpoints" / "step_00000002"), **settings},
    ]
    return run_ranks(train_and_count, 1, root=str(root), cache=str(sample_cache), runs=runs, counted="drawn")[0]


def test_pairs_are_those_of_the_drawn_windows(alone: dict[str, Any]) -> None:
    records = [record for record in alone["drawn"]["records"] if "train/loss" in record]
    assert [record["train/window"] for record in records] == FIRST[:4]
    causal = 4 * 2 * 64 * 65 // 2
    assert [round(r["train/attended_share"] * causal) for r in records] == alone["drawn"]["pairs"]
    assert {r["train/layer_00/attended_share"] for r in records} == {1.0}


def test_drawn_windows_resume_bitwise(alone: dict[str, Any]) -> None:
    whole, again = alone["drawn"], alone["drawn again"]
    assert again["losses"] == whole["losses"][2:] and again["state"] == whole["state"]
    late = [[r.get("val/loss") for r in run["records"] if r["step"] > 2] for run in (whole, again)]
    assert late[0] == late[1] and any(late[0])

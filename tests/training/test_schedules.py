"""Windows that are drawn for each step, and a curriculum of lengths: what is trained, counted, resumed and refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sepllm_train.base.errors import UserError
from sepllm_train.config.curriculum import Phase, phases_of
from sepllm_train.config.schema import AttentionConfig, Config, ParallelConfig, TrainingConfig
from sepllm_train.config.validate import validate
from sepllm_train.training.checkpoint import check_identity, identity
from sepllm_train.training.schedules import cut, draw, schedule_of
from tests.support.distributed_runner import run_ranks
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


@pytest.mark.parametrize(
    ("curriculum", "words"),
    [
        ([64], "entry 64 must be {length: TOKENS, steps: N}"),
        ([{"length": 512}], "entry {'length': 512} must be"),
        ([{"length": 512, "steps": 1.5}], "each a whole number of at least 1 or a share between 0 and 1"),
        ([{"length": 512, "steps": 10}], "curriculum takes 10 steps, and training.steps=10 must leave some"),
        ([{"length": 512, "steps": 0.01}], "a phase of less than one of training.steps=10"),
        ([{"length": 500, "steps": 2}], "each must be smaller than data.sequence_length=2048 and divide it"),
        ([{"length": 2048, "steps": 2}], "each must be smaller than data.sequence_length=2048"),
        ([{"length": 512, "steps": 2}, {"length": 256, "steps": 2}], "they must rise from phase to phase"),
    ],
)
def test_curricula_that_are_refused(curriculum: list, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        validate(Config(training=TrainingConfig(steps=10, curriculum=curriculum, global_batch=8)), 1)


def test_a_length_must_fit_the_layout() -> None:
    config = Config(training=TrainingConfig(curriculum=[{"length": 2, "steps": 1}]))
    with pytest.raises(UserError, match="the length 2 of training.curriculum must be a multiple of 4"):
        validate(replace(config, parallel=ParallelConfig(context=2)), 2)


def test_phases_in_shares() -> None:
    curriculum = [{"length": 0.25, "steps": 0.25}, {"length": 1024, "steps": 3}]
    config = Config(training=TrainingConfig(steps=10, curriculum=curriculum))
    assert phases_of(config) == [Phase(512, 1, 2, 1024), Phase(1024, 3, 5, 1024), Phase(2048, 6, 10, 1024)]
    assert [schedule_of(config).phase(step).length for step in range(1, 11)] == [512] * 2 + [1024] * 3 + [2048] * 5


def test_pieces_of_a_sample() -> None:
    starts = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 7], [0, 1, 2, 2, 4, 4, 4, 4]], dtype=torch.int32)
    batch = {"separator_class": torch.arange(16, dtype=torch.uint8).view(2, 8), "document_start": starts}
    pieces = cut(batch, 4)
    assert pieces["separator_class"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert pieces["document_start"].tolist() == [[0, 0, 0, 3], [0, 0, 0, 3], [0, 1, 2, 2], [0, 0, 0, 0]]
    assert pieces["document_start"].dtype == torch.int32 and starts[0, 4] == 3
    assert cut(batch, 8) is batch


SETTINGS: dict[str, Any] = {
    "attention": {
        "window_choices": CHOICES,
        "full_layers": "first",
        "separate_documents": True,
        "restart_positions": True,
    },
    "data": {"mask_boundary_loss": True},
    "training": {
        "steps": 5,
        "curriculum": [{"length": 16, "steps": 2}, {"length": 0.5, "steps": 0.2}],
        "validation_interval": 2,
        "validation_samples": 2,
        "keep_checkpoints": 5,
    },
}
LENGTHS = [16, 16, 32, 64, 64]
LAYERS, HIDDEN, FFN, HEADS, VOCABULARY, TOKENS = 4, 32, 64, 4, 4096, 2 * 64


@pytest.fixture(scope="module")
def alone(sample_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of one process with drawn windows and a curriculum, and two that go on from its checkpoints."""
    root = tmp_path_factory.mktemp("schedules")
    runs = [{"name": "both", **SETTINGS}]
    for step in (1, 2):
        runs.append(
            {"name": f"after {step}", "resume": str(root / "both" / "checkpoints" / f"step_0000000{step}"), **SETTINGS}
        )
    places = {"root": str(root), "cache": str(sample_cache)}
    return run_ranks(train_and_count, 1, **places, runs=runs, lengths=LENGTHS, windows=FIRST[:5])[0]


def trained(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of training steps."""
    return [record for record in run["records"] if "train/loss" in record]


def test_pairs_and_flops_are_those_of_each_step(alone: dict[str, Any]) -> None:
    steps = trained(alone["both"])
    assert [record["train/window"] for record in steps] == FIRST[:5]
    assert [record["train/sequence_length"] for record in steps] == LENGTHS
    causal = [LAYERS * TOKENS * (length + 1) // 2 for length in LENGTHS]
    for record, pairs, triangle in zip(steps, alone["pairs"], causal, strict=True):
        assert record["train/attended_share"] == pairs / triangle
    weights = LAYERS * (4 * HIDDEN**2 + 2 * HIDDEN * FFN)
    tokens, head = 5 * TOKENS, HIDDEN * VOCABULARY
    last = steps[-1]
    assert last["flops/model"] == 3 * (2 * (weights + head) * tokens + 4 * HIDDEN * sum(alone["pairs"]))
    assert last["flops/dense"] == 3 * (2 * (weights + head) * tokens + 4 * HIDDEN * sum(causal))
    paper = sum(pairs * length / (length + 1) for pairs, length in zip(alone["pairs"], LENGTHS, strict=True))
    assert last["flops/paper"] == pytest.approx(3 * (2 * weights * tokens + (4 * HIDDEN + HEADS) * paper), abs=9)


def test_a_phase_is_a_run_at_its_length(alone: dict[str, Any]) -> None:
    """The first step is that of a model with its window and length on the same tokens."""
    first = trained(alone["both"])[0]
    assert [first["train/loss"], first["train/grad_norm"]] == pytest.approx(alone["first"], rel=1e-6)


def test_validation_has_the_window_and_the_length_of_the_configuration(alone: dict[str, Any]) -> None:
    (loss,) = (r["val/loss"] for r in alone["both"]["records"] if r["step"] == 2 and "val/loss" in r)
    assert loss == alone["validation"]


@pytest.mark.parametrize("step", [1, 2])
def test_resume_is_bitwise_in_a_phase_and_at_its_end(alone: dict[str, Any], step: int) -> None:
    whole, again = alone["both"], alone[f"after {step}"]
    assert again["losses"] == whole["losses"][step:] and again["norms"] == whole["norms"][step:]
    assert again["state"] == whole["state"] and "state.finished_pairs" in whole["state"]
    for key in ("val/loss", "flops/model", "flops/dense", "flops/paper", "train/window", "train/sequence_length"):
        ours, theirs = ([r.get(key) for r in run["records"] if r["step"] > step] for run in (again, whole))
        assert ours == theirs and any(ours)


def test_rows_are_timed_in_every_phase_and_with_every_window(alone: dict[str, Any]) -> None:
    timing = alone["timing"]
    assert timing["steps"] == 2 * 3 * len(CHOICES), "more than the run has"
    assert [phase["last"] for phase in timing["phases"]] == [2, 3, 5] and len(timing["turns"]) == 2
    seconds = [phase["step_seconds"] for phase in timing["phases"]]
    assert timing["step_seconds"] == pytest.approx((2 * seconds[0] + seconds[1] + 2 * seconds[2]) / 5)
    assert min(seconds) > 0


@pytest.mark.slow
@pytest.mark.distributed
def test_layouts_agree_with_one_process(alone: dict[str, Any], check_layouts: Callable[..., None]) -> None:
    layouts = [
        {"tensor": 2, "sequence": True},
        {"pipeline": 2},
        {"pipeline": 2, "virtual_pipeline": 2},
        {"context": 2},
        {},
    ]
    check_layouts(alone["both"], SETTINGS, layouts)


def test_both_are_part_of_what_a_run_is() -> None:
    plain, drawn = Config(), Config(attention=AttentionConfig(window_choices=CHOICES))
    phased = Config(training=TrainingConfig(steps=100, curriculum=[{"length": 512, "steps": 0.1}]))
    same = Config(training=TrainingConfig(steps=100, curriculum=[{"length": 0.25, "steps": 10}]))
    plain, drawn, phased, same = (json.loads(json.dumps(identity(c, 1, {}, ""))) for c in (plain, drawn, phased, same))
    assert phased == same
    before = {k: v for k, v in plain.items() if k not in ("attention.window_choices", "training.curriculum")}
    check_identity(before, plain, "here", "no")
    with pytest.raises(UserError, match=r"attention.window_choices=None, this run has \[2, 4, 8, 16, 32\]"):
        check_identity(before, drawn, "here", "no")
    with pytest.raises(UserError, match=r"training.curriculum=\[\], this run has \[{'length': 512, 'steps': 10}\]"):
        check_identity(before, phased, "here", "no")

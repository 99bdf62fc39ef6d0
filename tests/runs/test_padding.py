"""Runs written when FLOPs and parameters included the padding of the vocabulary count as runs do today."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.compare.variants import check_conventions, check_counts
from sepllm_train.config.schema import ModelConfig
from sepllm_train.metrics.flops import FlopsCounter, parameter_count, shape_of
from sepllm_train.runs.padding import without_padding
from sepllm_train.runs.records import read_run
from sepllm_train.watch.follow import COUNTERS, FollowedRun

MODEL = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": None, "ffn": 128, "activation": "gelu"}
ENTRIES, LENGTH, BATCH = 4100, 128, 4
PADDED = {"one": 4224, "tensor2": 4352}
SHORT = 32


def run_json(padded: int, *, tied: bool = False, curriculum: Any = None) -> dict[str, Any]:
    """run.json of a run whose parameters include `padded` entries."""
    model = MODEL | {"tied_embeddings": tied}
    return {
        "name": "old",
        "status": "finished",
        "parameters": parameter_count(ModelConfig(**model), padded),
        "identity": {
            **{f"model.{key}": value for key, value in model.items()},
            "model.vocabulary": ENTRIES,
            "training.global_batch": BATCH,
        },
        "curriculum": curriculum,
        "comparable": {"data": {}, "tokenizer": "", "vocabulary": ENTRIES, "sequence_length": LENGTH},
    }


def record(step: int, padded: int, short: int = 0) -> dict[str, Any]:
    """A validation after `step` steps, of which the first `short` were on sequences of SHORT tokens."""
    shape, tokens = shape_of(ModelConfig(**MODEL), padded), step * BATCH * LENGTH
    parts = [(min(step, short) * BATCH * LENGTH, SHORT), (max(0, step - short) * BATCH * LENGTH, LENGTH)]
    counts = [FlopsCounter(shape, length).training(taken, taken * 7) for taken, length in parts]
    flops = {key: sum(count[key] for count in counts) for key in counts[0]}
    return {"step": step, "tokens": tokens, "seconds": float(step), "val/loss": 5.0 - step / 100, **flops}


def written(folder: Path, info: dict[str, Any], records: list[dict[str, Any]]) -> Path:
    """A run folder."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_run_that_changed_its_layout_is_counted_in_one_way(tmp_path: Path, tied: bool) -> None:
    """At step 200 the total falls where the padding was half as much: such a run was refused."""
    layouts = [(step, PADDED["tensor2" if step < 200 else "one"]) for step in (0, 199, 200, 201)]
    old = written(tmp_path / "old", run_json(PADDED["one"], tied=tied), [record(*one) for one in layouts])
    assert record(*layouts[1])["flops/dense"] > record(*layouts[2])["flops/dense"]
    run = read_run(old)
    check_counts(run)
    assert run.validation == [record(step, ENTRIES) for step, _ in layouts]
    assert run.info["parameters"] == parameter_count(ModelConfig(**MODEL, tied_embeddings=tied), ENTRIES)


def test_an_old_run_compares_with_a_new_one(tmp_path: Path) -> None:
    steps = (0, 1, 2)
    old = read_run(written(tmp_path / "old", run_json(4352), [record(step, 4352) for step in steps]))
    new = read_run(written(tmp_path / "new", run_json(ENTRIES), [record(step, ENTRIES) for step in steps]))
    check_conventions(old, new)
    assert (old.info, old.validation) == (new.info, new.validation)


def test_phases_of_a_curriculum_are_counted_at_their_lengths(tmp_path: Path) -> None:
    info = run_json(4224, curriculum=[{"length": SHORT, "steps": 10}])
    run = read_run(written(tmp_path / "old", info, [record(step, 4224, short=10) for step in (0, 5, 10, 15)]))
    assert run.validation == [record(step, ENTRIES, short=10) for step in (0, 5, 10, 15)]


def test_what_is_no_padding_is_left_alone() -> None:
    """Another way to count is for the comparison to refuse; a description that is not one changes nothing."""
    info = run_json(4224)
    _, corrected = without_padding(info)
    other = record(3, 4224) | {"flops/dense": record(3, 4224)["flops/dense"] + 2}
    assert corrected(other) == other and corrected(record(3, 4200)) == record(3, 4200)
    for identity in (None, [], {"model.vocabulary": ENTRIES}, {**info["identity"], "model.heads": 5}):
        broken = {**info, "identity": identity}
        same, corrected = without_padding(broken)
        assert same == broken and corrected(record(3, 4224)) == record(3, 4224)


def test_the_live_page_counts_as_the_comparison_does(tmp_path: Path) -> None:
    padded = PADDED["tensor2"]
    folder = written(tmp_path / "run", run_json(padded), [record(step, padded) for step in (0, 10, 20)])
    followed = FollowedRun(folder)
    followed.read()
    drawn = followed.curves("linear")["validation"]
    for key in ("flops/model", "flops/dense"):
        counted = [float(one) for one in drawn[COUNTERS.index(key)]]
        assert counted == [pytest.approx(one[key]) for one in read_run(folder).validation]
    assert followed.info["parameters"] == parameter_count(ModelConfig(**MODEL), ENTRIES)

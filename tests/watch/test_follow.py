"""Runs that are followed: what their files hold at any moment, against the reader of whole run folders."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.runs.records import read_run
from sepllm_train.watch import follow
from sepllm_train.watch.follow import FollowedRun
from sepllm_train.watch.tail import SLICE
from tests.compare.run_records import training, validation
from tests.watch.conftest import GrowingRun

NewRun = Callable[..., GrowingRun]


def points(run: FollowedRun, curve: str, scale: str = "linear") -> list[tuple[float, float]]:
    """(step, value) of a thinned curve."""
    drawn = run.curves(scale)[curve]
    return [(float(step), float(value)) for step, value in zip(drawn[0], drawn[-2], strict=True)]


def read_all(run: FollowedRun) -> bool:
    """Read until nothing is pending; whether anything was new."""
    changed = run.read()
    while run.pending:
        run.read()
    return changed


def expected(folder: Path, key: str) -> list[tuple[float, float]]:
    """(step, value) by the reader of the comparison."""
    run = read_run(folder)
    records = run.validation if key == "val/loss" else run.training
    return [(record["step"], pytest.approx(record[key], rel=1e-6)) for record in records]


def test_rows_are_followed_as_they_come(new_run: NewRun) -> None:
    run = new_run("one")
    followed = FollowedRun(run.folder)
    assert followed.read() and followed.facts()["status"] == "waiting"
    assert not followed.read()
    for first in (1, 11, 21):
        run.train(first, first + 9)
        assert read_all(followed)
        assert points(followed, "loss") == expected(run.folder, "train/loss")
        assert points(followed, "validation") == expected(run.folder, "val/loss")
        assert not followed.read()
    facts = followed.facts()
    assert (facts["step"], facts["steps"], facts["status"]) == (30, 100, "running")
    assert facts["loss"] == pytest.approx(4.7) and facts["validation"] == pytest.approx(4.8)
    # 2 seconds a step, 70 steps to go.
    assert facts["left"] == pytest.approx(140) and facts["interval"] == pytest.approx(2)
    assert facts["throughput"] == 500 and facts["share"] == 0.25 and facts["mfu"] is None
    assert facts["written"] == os.stat(run.log.path).st_mtime


def test_the_status_is_that_of_run_json(new_run: NewRun) -> None:
    run = new_run("one")
    run.train(1, 10, **{"train/mfu": 0.4})
    followed = FollowedRun(run.folder)
    followed.read()
    assert followed.facts()["mfu"] == 0.4
    for status in ("interrupted", "failed", "finished"):
        run.tell(status=status)
        assert followed.read()
        assert followed.facts()["status"] == status and followed.facts()["left"] is None


def test_a_torn_last_line_waits_until_it_is_whole(new_run: NewRun) -> None:
    run = new_run("one")
    run.train(1, 3)
    line = json.dumps(training(4, 4.5)) + "\n"
    followed = FollowedRun(run.folder)
    followed.read()
    for cut in range(0, len(line) - 1, 20):
        run.write(line[cut : cut + 20] if cut + 20 < len(line) - 1 else line[cut:-1])
        followed.read()
        assert followed.step == 3 and followed.notes == []
    run.write("\n")
    followed.read()
    assert points(followed, "loss")[-1] == (4, 4.5)


def test_a_resumed_run_rewinds_its_file(new_run: NewRun) -> None:
    """As the trainer does: later records go by atomic replacement, and other ones follow."""
    run = new_run("one")
    run.train(1, 40)
    followed = FollowedRun(run.folder)
    read_all(followed)
    run.log.rewind(15)
    run.train(16, 30, loss=7.0)
    assert read_all(followed)
    assert followed.step == 30
    assert points(followed, "loss") == expected(run.folder, "train/loss")
    assert points(followed, "validation") == expected(run.folder, "val/loss")


@pytest.mark.parametrize("longer", [False, True])
def test_a_file_written_anew_in_place_is_read_anew(new_run: NewRun, longer: bool) -> None:
    """The same inode, shorter or longer than before."""
    run = new_run("one")
    run.train(1, 20)
    followed = FollowedRun(run.folder)
    read_all(followed)
    node = os.stat(run.log.path).st_ino
    with open(run.log.path, "r+") as stream:
        stream.truncate(0)
    run.train(1, 25 if longer else 12, loss=8.0)
    assert os.stat(run.log.path).st_ino == node
    read_all(followed)
    assert points(followed, "loss") == expected(run.folder, "train/loss")


@pytest.mark.parametrize("seed", range(6))
def test_random_histories_give_what_the_comparison_reads(new_run: NewRun, seed: int) -> None:
    """Steps appended, abandoned without a rewind, rewound, torn; read at random moments."""
    chance = random.Random(seed)
    run = new_run("one")
    followed = FollowedRun(run.folder)
    step = 0
    for _ in range(60):
        event = chance.random()
        if event < 0.1:
            step = chance.randrange(step + 1)
        elif event < 0.2:
            step = chance.randrange(step + 1)
            run.log.rewind(step)
        elif event < 0.3:
            run.log.write(validation(step, chance.uniform(2, 9)))
        for _ in range(chance.randrange(8)):
            step += 1
            run.train(step, step, loss=chance.uniform(2, 9))
        if chance.random() < 0.5:
            read_all(followed)
            for curve, (key, _) in list(follow.CURVES.items())[:2]:
                if run.log.path.exists():
                    wanted = expected(run.folder, key)
                    assert points(followed, curve) == wanted and points(followed, curve, "log")[-1:] == wanted[-1:]


def test_broken_lines_are_named_and_skipped(new_run: NewRun) -> None:
    run = new_run("one")
    run.train(1, 2)
    run.write('{"step": 3, oops}\n\n[1]\n{"step": 3}\n')
    run.write(json.dumps(training(4, 4.0) | {"train/loss": "low"}) + "\n")
    run.write("[" * 100_000 + "\n" + "x" * (2 * SLICE) + "\n")
    run.train(5, 6)
    followed = FollowedRun(run.folder)
    read_all(followed)
    assert [step for step, _ in points(followed, "loss")] == [1, 2, 5, 6]
    assert followed.notes == [
        "Line 3 of metrics.jsonl is not JSON: it is skipped.",
        "Line 5 of metrics.jsonl is no JSON object: it is skipped.",
        "Line 6 of metrics.jsonl has no number for 'tokens': it is skipped.",
        "Line 7 of metrics.jsonl has no number for 'train/loss': it is skipped.",
        "Line 8 of metrics.jsonl is not JSON: it is skipped.",
        "1 more lines of metrics.jsonl are skipped.",
    ]


def test_losses_that_are_none_leave_gaps(new_run: NewRun) -> None:
    run = new_run("one")
    run.train(1, 3)
    run.log.write(training(4, math.nan))
    run.write(json.dumps(training(5, math.inf)) + "\n")
    run.train(6, 7)
    followed = FollowedRun(run.folder)
    read_all(followed)
    assert [(step, math.isnan(value)) for step, value in points(followed, "loss")] == [
        *((step, False) for step in (1, 2, 3)),
        *((step, True) for step in (4, 5)),
        *((step, False) for step in (6, 7)),
    ]
    run.log.write(training(8, math.nan))
    read_all(followed)
    assert followed.facts()["loss"] is None


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json"])
def test_links_out_of_the_folder_are_not_followed(new_run: NewRun, tmp_path: Path, name: str) -> None:
    run = new_run("one")
    run.train(1, 3)
    secret = tmp_path / "secret"
    (run.folder / name).rename(secret)
    (run.folder / name).symlink_to(secret)
    followed = FollowedRun(run.folder)
    read_all(followed)
    assert followed.notes == [f"{name} cannot be read: it is a symbolic link, which is not followed."]
    assert followed.info == {} if name == "run.json" else followed.step == -1


def test_a_pipe_does_not_hang_the_reader(new_run: NewRun) -> None:
    run = new_run("one")
    os.mkfifo(run.folder / "metrics.jsonl")
    followed = FollowedRun(run.folder)
    followed.read()
    assert followed.notes == ["metrics.jsonl cannot be read: it is no plain file."]


def test_a_folder_that_goes_away_keeps_its_last_records(new_run: NewRun) -> None:
    run = new_run("one")
    run.train(1, 5)
    followed = FollowedRun(run.folder)
    read_all(followed)
    run.log.path.unlink()
    assert followed.read()
    assert followed.notes == ["metrics.jsonl is gone: these are its last records."]
    assert len(points(followed, "loss")) == 5


def test_the_time_left_goes_with_tokens_where_batches_grow(new_run: NewRun) -> None:
    """2 seconds a step, each of as many tokens: half of the tokens are read."""
    run = new_run("growing", tokens=2 * training(30, 5.0)["tokens"])
    run.train(1, 30)
    followed = FollowedRun(run.folder)
    read_all(followed)
    assert followed.facts()["left"] == pytest.approx(60)


@pytest.mark.parametrize("content", ["[]", "{", '"run"'])
def test_a_run_json_that_tells_nothing(new_run: NewRun, content: str) -> None:
    run = new_run("one")
    (run.folder / "run.json").write_text(content)
    run.train(1, 2)
    followed = FollowedRun(run.folder)
    followed.read()
    facts: dict[str, Any] = followed.facts()
    assert facts["status"] == "unknown" and facts["steps"] is None and facts["left"] is None
    assert facts["notes"] == ["run.json is no JSON object: status and settings are unknown."]

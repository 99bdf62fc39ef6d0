"""Users' mistakes: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.compare.run_records import training, unwrapped, validation
from tests.support.command import command

main = command("compare")

GOOD = [validation(0, 6), validation(10, 5), validation(20, 4)]


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Compares folders that must be refused; gives the sentence."""

    def refuse(*folders: Path | str, options: tuple[str, ...] = ()) -> str:
        output = tmp_path / "out"
        assert main([*map(str, folders), "--output", str(output), *options]) == 2
        assert not output.exists()
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
        return captured.err.removeprefix("error: ").strip()

    return refuse


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"corpus": {"sha256": "xyz", "weight": 1.0}}}, ("data.corpus.sha256", "'abc'", "'xyz'")),
        ({"data": {"other": {"sha256": "abc", "weight": 1.0}}}, ("data.corpus.sha256", "'abc'", "'absent'")),
        ({"tokenizer": "e" * 64}, ("tokenizers", "d" * 64, "e" * 64)),
        ({"vocabulary": 50277}, ("vocabularies", "4096", "50277")),
        ({"sequence_length": 1024}, ("sequence lengths", "2048", "1024")),
        ({"validation_samples": 8}, ("validation_samples", "'absent'", "8")),
    ],
    ids=["data", "corpus", "tokenizer", "vocabulary", "sequence_length", "anything_else"],
)
def test_runs_that_do_not_compare(
    make_run: Callable[..., Path], refusal: Callable[..., str], change: dict[str, Any], words: tuple[str, ...]
) -> None:
    one, two = make_run("one", GOOD), make_run("two", GOOD, comparable=change)
    sentence = refusal(one, two)
    assert all(word in sentence for word in (*words, str(one), str(two))), sentence


def test_records_of_before_compare_with_those_of_today(
    make_run: Callable[..., Path], refusal: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Older runs have the tokens of their data on record, today's documents and separators too."""
    data = {"corpus": {"sha256": "abc", "weight": 1.0, "index": "1", "separators": "2"}}
    old, new = make_run("old", GOOD), make_run("new", GOOD, comparable={"data": data})
    assert main([str(old), str(new), "--output", str(tmp_path / "compared")]) == 0
    capsys.readouterr()
    other = make_run("other", GOOD, comparable={"data": {"corpus": {**data["corpus"], "separators": "9"}}})
    assert "data.corpus.separators is '2' in" in refusal(new, other)


def test_another_order_of_the_data_is_a_caveat(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make_run("one", GOOD)
    two = make_run("two", GOOD, comparable={"seed_of_data_order": 7}, devices="NVIDIA H200", parameters=6_000_000)
    assert main([str(one), str(two), "--output", str(tmp_path / "out")]) == 0
    printed = unwrapped(capsys.readouterr().out)
    assert "different orders" in printed and "different devices" in printed and "different sizes" in printed


def test_missing_and_broken_folders(make_run: Callable[..., Path], refusal: Callable[..., str], tmp_path: Path) -> None:
    good = make_run("good", GOOD)
    assert refusal(good) == "A comparison needs at least two run folders, and one was given."
    assert "nowhere is not a folder" in refusal(good, tmp_path / "nowhere")
    assert "same run" in refusal(good, f"{good}/../good")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty / "run.json") in refusal(good, empty)
    unlogged = make_run("unlogged", GOOD)
    (unlogged / "metrics.jsonl").unlink()
    assert f"{unlogged / 'metrics.jsonl'} does not exist" in refusal(good, unlogged)
    torn = make_run("torn", GOOD)
    (torn / "run.json").write_text('{"name": ')
    assert f"{torn / 'run.json'} is not JSON" in refusal(good, torn)
    (torn / "run.json").write_text(json.dumps({"name": "torn"}))
    assert "comparable" in refusal(good, torn)
    (torn / "run.json").write_text(json.dumps({"name": "torn", "comparable": {"data": {}}}))
    assert "comparable.tokenizer" in refusal(good, torn)
    (torn / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    (torn / "run.json").write_text(json.dumps({"comparable": {}}))
    assert "not UTF-8" in refusal(good, torn)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("garbage\n", "line 2 is not JSON"),
        ('{"step": 10, "tok{"step": 20}\n', "line 2 is not JSON"),
        ("[1, 2]\n", "line 2 does not hold a JSON object"),
        ('{"step": 10, "val/loss": 5.0}\n', "line 2 has no number of 0 or more for 'tokens'"),
        (json.dumps(validation(10, 5) | {"seconds": "12"}) + "\n", "line 2 has no number of 0 or more for 'seconds'"),
        (json.dumps(validation(10, 5) | {"val/loss": "low"}) + "\n", "line 2: 'val/loss' must be a number"),
        (json.dumps(training(10, 5) | {"train/loss": "low"}) + "\n", "line 2: 'train/loss' must be a number"),
    ],
    ids=["garbage", "torn", "array", "no_tokens", "text_seconds", "text_val_loss", "text_train_loss"],
)
def test_garbage_in_the_middle_is_named_by_file_and_line(
    make_run: Callable[..., Path], refusal: Callable[..., str], line: str, words: str
) -> None:
    good, bad = make_run("good", GOOD), make_run("bad", [GOOD[0], line, *GOOD[1:]])
    assert f"{bad / 'metrics.jsonl'} {words}" in refusal(good, bad)


def test_curves_that_are_too_short(make_run: Callable[..., Path], refusal: Callable[..., str]) -> None:
    good = make_run("good", GOOD)
    assert "has 0 validation points" in refusal(good, make_run("none", [training(1, 6.0), training(2, 5.0)]))
    assert "has 1 validation point with" in refusal(good, make_run("one", [validation(0, 6), validation(5, None)]))
    assert "has 0 validation points" in refusal(good, make_run("empty", []))
    later = make_run("later", [validation(30, 4), validation(40, 3)])
    assert "no tokens in common" in refusal(good, later)


def test_a_loss_that_no_run_reached(make_run: Callable[..., Path], refusal: Callable[..., str]) -> None:
    one, two = make_run("one", GOOD), make_run("two", GOOD[:2])
    assert refusal(one, two, options=("--loss", "2.5")) == ("No run reached --loss 2.5: the lowest is 4.0000, of one.")
    assert "No run reached --loss nan" in refusal(one, two, options=("--loss", "nan"))


def test_output_that_cannot_be_written(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(make_run("one", GOOD)), str(make_run("two", GOOD))]
    file = tmp_path / "file"
    file.write_text("mine")
    assert main([*runs, "--output", str(file)]) == 2
    assert "is a file: name a folder" in capsys.readouterr().err
    assert main([*runs, "--output", str(file / "below")]) == 2
    assert "Cannot write" in capsys.readouterr().err
    assert file.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_without_permission(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(make_run("one", GOOD)), str(make_run("two", GOOD))]
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert main([*runs, "--output", str(locked)]) == 2
    assert "Cannot write" in capsys.readouterr().err

"""Figures with known answers: costs to reach a loss, losses at equal tokens, resumed and running runs."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.compare.results import at_tokens, common_loss, first_reach
from sepllm_train.runs.records import Run, read_run, read_runs
from tests.compare.run_records import training, unwrapped, validation
from tests.support.command import command

main = command("compare")


def cells(text: str, title: str) -> dict[str, list[str]]:
    """Rows of the Markdown table under a title: name to figures."""
    table = text.split(f"**{title}**")[1].strip().split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows[2:]}


def test_costs_to_reach_the_loss_that_both_reach(
    dense: Path, sep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """3.25 is sep's best: 40 steps of it, and 35 of dense's (half way from 3.5 to 3.0)."""
    assert main([str(dense), str(sep), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    rows = cells(printed, "To reach validation loss 3.2500")
    assert rows["dense"] == ["140 MFLOP", "1.000x", "1m10s", "1.000x", "35k", "1.000x"]
    assert rows["sep"] == ["120 MFLOP", "0.857x", "1m00s", "0.857x", "40k", "1.143x"]
    assert "sep reached validation loss 3.2500 with 0.857x the FLOPs (flops/model)" in unwrapped(printed)
    assert "one run of each" in unwrapped(printed)


def test_losses_at_equal_tokens(dense: Path, sep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(dense), str(sep), "--output", str(tmp_path / "out")]) == 0
    rows = cells(capsys.readouterr().out, "At 40k tokens")
    assert rows["dense"] == ["3.0000", "-", "1.5000", "160 MFLOP", "1.000x", "1m20s", "1.000x"]
    assert rows["sep"] == ["3.2500", "+0.2500", "1.6250", "120 MFLOP", "0.750x", "1m00s", "0.750x"]
    written = (tmp_path / "out" / "comparison.md").read_text(encoding="utf8")
    assert cells(written, "Validation loss at equal tokens")["10k"] == ["5.0000", "5.5000 (+0.5000)"]


def test_a_chosen_loss_and_convention(dense: Path, sep: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """At 4.5 dense has had 15 steps and sep 18, in the paper's convention at 2000 and 1500 FLOPs a token."""
    arguments = ["--output", str(tmp_path / "out"), "--loss", "4.5", "--flops", "paper"]
    assert main([str(dense), str(sep), *arguments]) == 0
    rows = cells(capsys.readouterr().out, "To reach validation loss 4.5000")
    assert rows["dense"][0] == "30 MFLOP"
    assert rows["sep"][:2] == ["27 MFLOP", "0.900x"]


def test_a_loss_that_one_run_misses(dense: Path, sep: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(dense), str(sep), "--output", str(tmp_path / "out"), "--loss", "3.1"]) == 0
    printed = capsys.readouterr().out
    assert cells(printed, "To reach validation loss 3.1000")["sep"][0] == "not reached (best 3.2500)"
    assert "sep did not reach validation loss 3.1000." in unwrapped(printed)


def test_the_first_crossing_counts_even_if_the_loss_rises_again(make_run: Callable[..., Path]) -> None:
    bumpy = make_run("bumpy", [validation(step, loss) for step, loss in ((0, 6), (10, 4), (20, 5), (30, 3))])
    reached = first_reach(read_run(bumpy), 4.5)
    assert reached is not None and reached.exact
    assert reached.spent["tokens"] == 7500
    assert reached.spent["seconds"] == 15


def test_a_loss_already_reached_at_the_first_point_is_a_bound(
    dense: Path, make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = make_run("late", [validation(20, 3.8), validation(40, 3.2)])
    assert main([str(dense), str(late), "--output", str(tmp_path / "out"), "--loss", "4"]) == 0
    printed = capsys.readouterr().out
    assert cells(printed, "To reach validation loss 4.0000")["late"] == [
        "at most 80 MFLOP",
        "-",
        "at most 40s",
        "-",
        "at most 20k",
        "-",
    ]
    assert "only bounds" in unwrapped(printed)


def test_a_resumed_run_keeps_the_later_records(make_run: Callable[..., Path]) -> None:
    """Stopped after step 30, resumed from step 10: all that came after 10 in the first life is gone."""
    first_life = [validation(0, 6), training(10, 5.0), validation(10, 5), validation(20, 9), validation(30, 8)]
    second_life = [training(20, 4.0), validation(20, 4), training(25, 3.6), validation(40, 3)]
    run = read_run(make_run("resumed", [*first_life, *second_life]))
    assert [(r["step"], r["val/loss"]) for r in run.validation] == [(0, 6), (10, 5), (20, 4), (40, 3)]
    assert [(r["step"], r["train/loss"]) for r in run.training] == [(10, 5.0), (20, 4.0), (25, 3.6)]


CURVE = [(0, 6), (10, 5), (20, 4), (30, 3.5), (40, 3)]


def steps_of(run: Run) -> list[tuple[int, float]]:
    return [(record["step"], record["val/loss"]) for record in run.validation]


@pytest.mark.parametrize(
    ("origin", "kept", "second"),
    [
        ("", [], [validation(20, 4), training(25, 3.8), validation(30, 3.5)]),
        ("", [20], [training(25, 3.8), validation(30, 3.5)]),
        ("", [10, 20, 40], [training(25, 3.8), validation(30, 3.5)]),
        ("checkpoints/step_00000020", [], [training(25, 3.8), validation(30, 3.5)]),
    ],
    ids=["validated where it began", "from its newest checkpoint", "trained on meanwhile", "from a checkpoint"],
)
def test_a_run_has_the_records_of_the_one_it_went_on_from(
    make_run: Callable[..., Path], origin: str, kept: list[int], second: list[Any]
) -> None:
    """The first run was killed beyond step 20, from which the second went on; the third went on from the second."""
    first = make_run("first", [*(validation(*point) for point in CURVE[:3]), training(21, 9), validation(24, 9)])
    for step in kept:
        (first / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    second_run = make_run("second", second, origin=str(first / origin))
    (second_run / "checkpoints" / "step_00000030").mkdir(parents=True)
    third = make_run("third", [training(35, 3.2), validation(40, 3)], origin=str(second_run))
    run = read_run(third)
    assert steps_of(run) == CURVE and run.gap == ""
    assert [record["step"] for record in run.training] == [25, 35]
    assert [record["tokens"] for record in run.validation] == [0, 10_000, 20_000, 30_000, 40_000]
    assert steps_of(read_run(second_run)) == CURVE[:4]


def test_a_run_continued_in_its_own_folder_names_itself(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = read_run(make_run("own", [validation(*point) for point in CURVE], origin=str(tmp_path / "own")))
    assert steps_of(run) == CURVE and run.gap == ""


def test_records_that_are_missing_are_told(
    dense: Path, make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late, gone = [validation(30, 3.5), validation(40, 3)], tmp_path / "gone"
    run = make_run("late", late, origin=str(gone))
    assert main([str(dense), str(run), "--output", str(tmp_path / "out")]) == 0
    words = f"the records before step 30, of the run that it went on from, are missing ({gone} is not there)."
    assert f"late: {words}" in unwrapped(capsys.readouterr().out)
    short = make_run("short", late[1:], origin=str(gone))
    assert main([str(dense), str(short), "--output", str(tmp_path / "out")]) == 2
    assert "a curve needs two: the records before step 40, of the run that it went" in capsys.readouterr().err
    make_run("gone", [validation(*point) for point in CURVE[:3]], identity={"model.layers": 2, "seed": 1})
    other = make_run("other", late, origin=str(gone), identity={"model.layers": 3, "init_from": None})
    assert read_run(other).gap.endswith(f"are missing ({gone} is another run by now)")
    assert steps_of(read_run(run)) == CURVE


def test_a_running_run_loses_its_unfinished_line(
    dense: Path, make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [validation(0, 6), validation(10, 4.5), '{"step": 20, "tokens": 20']
    running = make_run("running", records, status="running")
    assert len(read_run(running).validation) == 2
    assert main([str(dense), str(running), "--output", str(tmp_path / "out")]) == 0
    assert "running is not finished" in unwrapped(capsys.readouterr().out)


def test_losses_that_are_not_finite_are_passed_over(make_run: Callable[..., Path]) -> None:
    broken = make_run("nan", [validation(0, 6), validation(10, None), validation(20, 4)])
    run = read_run(broken)
    assert math.isnan(run.validation[1]["val/loss"])
    assert at_tokens(run, 10_000) == 5
    assert common_loss([run]) == 4


def test_datasets_of_a_blend_have_their_own_table(make_run: Callable[..., Path], tmp_path: Path) -> None:
    def records(books: float) -> list[dict]:
        return [
            validation(step, 6 - step / 10, **{"val/books/loss": books - step / 10, "val/code/loss": 3.0})
            for step in (0, 10, 20)
        ]

    folders = [str(make_run("one", records(7.0))), str(make_run("two", records(8.0)))]
    assert main([*folders, "--output", str(tmp_path / "out")]) == 0
    rows = cells((tmp_path / "out" / "comparison.md").read_text(), "Validation loss by dataset at 20k tokens")
    assert rows == {"one": ["5.0000", "3.0000"], "two": ["6.0000", "3.0000"]}


def test_the_curves_are_written_whole(dense: Path, sep: Path, tmp_path: Path) -> None:
    assert main([str(dense), str(sep), "--output", str(tmp_path / "out")]) == 0
    with open(tmp_path / "out" / "curves.csv", newline="", encoding="utf8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 45
    points = [row for row in rows if row["run"] == "sep" and row["val/loss"]]
    assert [float(row["val/loss"]) for row in points] == [6.0, 5.5, 4.25, 3.75, 3.25]
    assert [int(row["flops/model"]) for row in points] == [0, 30_000_000, 60_000_000, 90_000_000, 120_000_000]
    assert sum(1 for row in rows if row["train/loss"]) == 80


def test_runs_of_one_name_are_told_apart(make_run: Callable[..., Path]) -> None:
    records = [validation(0, 6), validation(10, 4)]
    folders = [make_run("seed1", records, name="sep"), make_run("seed2", records, name="sep")]
    assert [run.label for run in read_runs(folders)] == [f"sep ({folder})" for folder in folders]

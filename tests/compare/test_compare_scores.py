"""Scores of evaluations during training in a comparison."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.runs.records import read_run, score_of
from tests.compare.run_records import counters, evaluation, straight, unwrapped
from tests.support.command import command

main = command("compare")
SVG = "{http://www.w3.org/2000/svg}"


def scored(make_run: Callable[..., Path], name: str, *records: dict[str, Any], cost: float = 4.0) -> Path:
    """A run with validations and `records`."""
    return make_run(name, sorted([*straight(40, cost), *records], key=lambda record: record["step"]))


def test_figures_and_table(make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each run; one figure for each task, of its accuracy where it has one."""
    dense = scored(make_run, "dense", evaluation(20, 0.5), evaluation(40, 0.625))
    sep = scored(make_run, "sep", evaluation(20, 0.25, 3.0), evaluation(40, 0.75, 3.0), cost=3.0)
    assert main([str(dense), str(sep), "--output", str(tmp_path / "out")]) == 0
    told = unwrapped(capsys.readouterr().out)
    assert "**Scores of the last evaluation**" in told
    assert "| dense | 40k | 0.3125 | 0.6250 ± 0.0100 | 16.0000 |" in told
    assert "| sep | 40k | 0.3750 | 0.7500 ± 0.0100 | 13.3333 |" in told
    figures = {path.stem for path in (tmp_path / "out").glob("score_*.svg")}
    assert figures == {"score_piqa", "score_wikitext"}
    root = ET.parse(tmp_path / "out" / "score_piqa.svg").getroot()
    texts = {"".join(element.itertext()).strip() for element in root.iter(f"{SVG}text")}
    assert {"piqa acc against FLOPs", "piqa acc", "dense", "sep"} <= texts
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())["scores"]
    assert found["piqa/acc"] == {"dense": [0.625], "sep": [0.75]} and "piqa/acc_stderr" not in found
    with open(tmp_path / "out" / "curves.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["eval/piqa/acc"] for row in rows if row["eval/piqa/acc"]] == ["0.5", "0.625", "0.25", "0.75"]
    assert "Scores are of the tasks" in (tmp_path / "out" / "comparison.html").read_text()


def test_seeds_are_one_variant(make_seeds: Callable[..., list[Path]], tmp_path: Path) -> None:
    folders = []
    for name, score in (("dense", 0.5), ("sep", 0.625)):
        seeds = {seed: [*straight(40), evaluation(40, score + seed / 8)] for seed in (1, 2)}
        folders += make_seeds(name, seeds)
    # A run that was also evaluated in between, and runs that are older than the group.
    with open(folders[0] / "config.yaml", "a") as file:
        file.write("evaluation: {tasks: [piqa], interval: 20}\n")
    assert main([*map(str, folders), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "Scores of the last evaluation" in text
    rows = [line.split() for line in text.partition("Scores of the last evaluation")[2].splitlines()[4:6]]
    assert [row[7] for row in rows] == ["0.6875", "0.8125"]


@pytest.mark.parametrize(
    "other", [[], [evaluation(40, 0.5, documents=7)], [evaluation(20, 0.5, limit=5), evaluation(40, 0.5)]]
)
def test_what_does_not_compare_is_left_out(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], other: list[dict[str, Any]]
) -> None:
    """A run without scores, one of other documents, and one whose own evaluations differ."""
    dense = scored(make_run, "dense", evaluation(20, 0.5), evaluation(40, 0.5))
    sep = scored(make_run, "sep", *other)
    assert main([str(dense), str(sep), "--output", str(tmp_path / "out")]) == 0
    told = unwrapped(capsys.readouterr().out)
    figures = {path.stem for path in (tmp_path / "out").glob("score_*.svg")}
    assert figures == ({"score_wikitext"} if other else set()) and "piqa acc" not in told
    different = "limit" if other and "limit" in other[0]["evaluation"]["piqa"] else "documents"
    assert (f"Scores of piqa are left out: they have a different {different}." in told) == bool(other)


def test_evaluations_of_a_resumed_run(make_run: Callable[..., Path]) -> None:
    """A step may be trained, validated, evaluated and saved; what a resumed run has written again stands."""
    records = [*straight(40)[:3], evaluation(20, 0.5), *straight(40)[2:3], evaluation(20, 0.75), counters(20, 4.0)]
    run = read_run(make_run("run", [*records, *straight(40)[3:]]))
    assert [record["eval/piqa/acc"] for record in run.evaluation] == [0.75] and len(run.validation) == 5


def test_keys_of_scores() -> None:
    assert score_of("eval/gsm8k_cot/exact_match/strict-match") == ("gsm8k_cot", "exact_match/strict-match")
    for key in (
        "eval/seconds",
        "eval/piqa/acc_stderr",
        "val/loss",
        "eval/../x y/acc",
        "eval/é/acc",
        "eval/piqa/" + "x" * 65,
    ):
        assert score_of(key) is None

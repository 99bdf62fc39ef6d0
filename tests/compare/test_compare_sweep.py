"""Sweeps of the learning rate: what is one, its verdict, its table and its figure."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sepllm_train.compare.report import REFERENCE, Report, build_report
from sepllm_train.compare.results import find_sweep
from sepllm_train.compare.variants import read_variants
from tests.compare.run_records import unwrapped, validation
from tests.support.command import command

main = command("compare")

Seeds = Callable[..., list[Path]]
LOSSES = {0.001: 4.0, 0.002: 3.0, 0.004: 3.5}


@pytest.fixture
def make_sweep(make_seeds: Seeds) -> Callable[..., list[Path]]:
    """Writes the runs of a sweep: the loss after 40 steps is that of the learning rate and a tenth of the seed."""

    def make(
        pattern: str, losses: dict[float, float], seeds: tuple[int, ...] = (1, 2, 3), **settings: Any
    ) -> list[Path]:
        folders = []
        for rate, loss in losses.items():
            curves = {seed: [validation(0, 6), validation(20, 5), validation(40, loss + seed / 10)] for seed in seeds}
            for folder in make_seeds(f"{pattern}_lr{rate:g}", curves):
                config = yaml.safe_load((folder / "config.yaml").read_text())
                own = {"attention": {"pattern": pattern}, "optim": {"lr": rate, "min_lr": rate / 10}}
                (folder / "config.yaml").write_text(yaml.safe_dump({**config, **own, **settings}))
                folders.append(folder)
        return folders

    return make


def report(folders: list[Path], **options: Any) -> Report:
    """The comparison of runs."""
    return build_report(read_variants(folders, warn=lambda _: None), **options)


def diverge(folder: Path) -> None:
    """Make the loss of a run infinite after its middle."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records[-1]["val/loss"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_one_verdict_names_the_best_rate(make_sweep: Seeds) -> None:
    """Seeds move all rates alike, so that every difference is exact."""
    found = report(make_sweep("dense", LOSSES))
    assert found.sweep is not None and found.sweep.tokens == 40_000
    (curve,) = found.sweep.curves
    assert [(point.rate, point.loss) for point in curve.points] == [
        (0.001, pytest.approx(4.2)),
        (0.002, pytest.approx(3.2)),
        (0.004, pytest.approx(3.7)),
    ]
    assert found.verdict == (
        "The lowest validation loss at 40k tokens, 3.2000, mean of 3 seeds, is that of learning rate 0.002. Intervals "
        "are 95% by Student's t over pairs of runs of the same seed, not corrected for the number of learning rates."
    )
    assert "To reach" not in found.markdown()
    assert "| dense_lr0.004 |         0.004 |     3 | 3.7000 | +0.5000 [+0.5000, +0.5000] |" in found.markdown()
    assert found.data()["learning_rates"]["curves"][0]["best"] == 0.002


def test_rates_that_are_not_shown_to_be_worse_and_ends_are_named(make_sweep: Seeds) -> None:
    folders = make_sweep("dense", {0.001: 4.0, 0.002: 3.2, 0.004: 3.0})
    # The seeds of 0.002 end at 3.1, 3.4 and 3.3 where those of 0.004 do at 3.1, 3.2 and 3.3.
    for folder, loss in zip(folders[3:6], (3.1, 3.4, 3.3), strict=True):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1]) | {"val/loss": loss}
        (folder / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    words = report(folders).verdict
    assert (
        "is that of learning rate 0.004; 0.002 is not shown to be worse. It is the highest rate of the sweep" in words
    )
    one = report(make_sweep("one", LOSSES, seeds=(1,)))
    assert one.verdict.endswith("This is one run of each: another seed may well make another rate the best.")


def test_a_run_that_diverged_moves_no_other(make_sweep: Seeds) -> None:
    folders = make_sweep("dense", LOSSES)
    diverge(folders[-1])
    found = report(folders, loss=REFERENCE)
    assert found.sweep is not None and found.sweep.tokens == 40_000
    assert found.sweep.curves[0].points[-1].loss is None and len(found.sweep.curves[0].points[-1].losses) == 2
    assert "not all seeds got there with 0.004." in found.verdict
    assert "2 of 3 seeds got there" in found.markdown()
    assert "cross: not all seeds got there" in found.files()["loss_vs_learning_rate.svg"].decode()


def test_patterns_are_compared_at_their_own_best_rates(make_sweep: Seeds) -> None:
    dense, sep = make_sweep("dense", LOSSES), make_sweep("sep", {0.001: 4.0, 0.002: 3.6, 0.004: 3.25})
    found = report([*dense, *sep])
    assert found.sweep is not None and [curve.label for curve in found.sweep.curves] == ["dense", "sep"]
    assert "dense: the lowest validation loss at 40k tokens, 3.2000, mean of 3 seeds" in found.verdict
    assert "At its own best rate the loss of sep is higher than dense's (+0.2500, 95% interval +0.2500" in found.verdict


def test_the_command_draws_the_sweep(make_sweep: Seeds, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(folder) for folder in make_sweep("dense", LOSSES)]
    assert main([*folders, "--output", str(tmp_path / "out")]) == 0
    assert "is that of learning rate 0.002" in unwrapped(capsys.readouterr().out)
    root = ET.parse(tmp_path / "out" / "loss_vs_learning_rate.svg").getroot()
    texts = {"".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"0.001", "0.002", "0.004", "learning rate", "validation loss at 40k tokens (nats)"} <= texts
    assert (tmp_path / "out" / "comparison.html").read_text().count("<svg") == 4
    assert not (tmp_path / "out" / "ratios.svg").exists()
    assert main([*folders, "--output", str(tmp_path / "out"), "--loss", "4.5"]) == 0
    assert "To reach validation loss 4.5000" in capsys.readouterr().out


def test_what_is_no_sweep(make_sweep: Seeds, make_seeds: Seeds) -> None:
    """Two rates; another setting in one of them; no learning rate in the configuration."""
    two = make_sweep("two", {0.001: 4.0, 0.002: 3.0})
    assert find_sweep(read_variants(two)) is None
    assert find_sweep(read_variants([*two, *make_sweep("two", {0.004: 3.5}, training={"steps": 41})])) is None
    plain = [folder for name in ("a", "b", "c") for folder in make_seeds(name, {1: 10})]
    assert find_sweep(read_variants(plain)) is None

"""Figures of rows of several seeds, each worked out by hand; what is claimed of them and what is not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.base.errors import UserError
from sepllm_train.compare.plots import mean_curve
from sepllm_train.compare.report import CONSOLE, REFERENCE, Report, build_report
from sepllm_train.compare.timing import read_timing
from sepllm_train.compare.variants import read_variants
from tests.compare.run_records import unwrapped, validation
from tests.support.command import command

main = command("compare")

Seeds = Callable[..., list[Path]]


def report(*rows: list[Path], loss: float | str | None = 5.0, **options: Any) -> Report:
    """The comparison of rows of folders."""
    return build_report(read_variants([folder for row in rows for folder in row], warn=lambda _: None), loss, **options)


def cells(text: str, title: str) -> dict[str, list[str]]:
    """Rows of the Markdown table whose title begins so: name to figures."""
    table = text.split(f"**{title}")[1].split("\n\n")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows[2:]}


def test_costs_are_paired_by_seed(make_seeds: Seeds) -> None:
    """Steps to a loss of 5: 10, 20, 16 and 10, 40, 64 in another order, at 4 and 3 thousand FLOPs a token.

    Ratios of tokens by seed 1, 2, 4: mean 2, interval 2 exp(+- 4.302653 ln 2 / sqrt 3). FLOPs: three quarters of that.
    """
    dense = make_seeds("dense", {1: 10, 2: 20, 3: 10})
    sep = make_seeds("sep", {3: 40, 1: 10, 2: 40}, cost=3.0)
    found = report(dense, sep)
    ratios = found.reaches[1].ratios
    assert ratios["tokens"].seeds == pytest.approx([4, 1, 2])
    half = math.exp(1.721880)
    for key, factor in (("tokens", 1), ("flops/model", 0.75), ("seconds", 0.75)):
        estimate = ratios[key].estimate
        assert estimate is not None and estimate.n == 3
        assert (estimate.mean, estimate.low, estimate.high) == pytest.approx(
            (2 * factor, 2 * factor / half, 2 * factor * half), rel=1e-5
        )
    # Geometric mean of 10, 20 and 10 thousand tokens: 12,599; times 2 is that of 40, 10 and 40.
    assert found.reaches[0].costs["tokens"] == pytest.approx(12_599.2, abs=0.1)
    assert found.reaches[1].costs["tokens"] == pytest.approx(25_198.4, abs=0.1)
    assert max(map(len, found.console().splitlines())) <= CONSOLE
    row = cells(found.markdown(), "To reach validation loss 5.0000")["sep"]
    assert row == [
        "3",
        "75.6 MFLOP",
        "1.500x [0.268, 8.392]",
        "38s",
        "1.500x [0.268, 8.392]",
        "25.2k",
        "2.000x [0.357, 11.190]",
    ]
    by_seed = found.markdown().split("**Seed by seed**")[1]
    assert "| sep     |    3 |     5.0000 |   5.0000 |   120 MFLOP | 3.000x |" in by_seed


def test_losses_at_equal_tokens_are_paired_by_seed(make_seeds: Seeds) -> None:
    """At 40k tokens 2, 3.5, 1 against 2.1, 3.7, 1.3: differences 0.1, 0.2, 0.3, so 0.2 +- 4.302653 0.1 / sqrt 3."""

    def ends_at(loss: float) -> list[dict[str, Any]]:
        return [validation(0, 6), validation(40, loss)]

    dense = make_seeds("dense", {1: ends_at(2.0), 2: ends_at(3.5), 3: ends_at(1.0)})
    sep = make_seeds("sep", {1: ends_at(2.1), 2: ends_at(3.7), 3: ends_at(1.3)})
    found = report(dense, sep)
    change = found.equal[1].difference
    assert change is not None
    assert (change.mean, change.low, change.high) == pytest.approx((0.2, -0.0484138, 0.4484138), abs=1e-6)
    assert found.equal[0].loss == pytest.approx(6.5 / 3)
    assert cells(found.console(), "At 40k tokens")["sep"][1:4] == ["2.3667", "+0.2000 [-0.0484, +0.4484]", "1.1833"]
    assert "At 40k tokens no difference in validation loss is shown (+0.2000, 95% interval -0.0484" in found.verdict


def test_only_what_excludes_one_is_called_a_difference(make_seeds: Seeds) -> None:
    """The same tokens to the loss but for a scatter, at three quarters of the FLOPs and seconds of a token."""
    dense = make_seeds("dense", {1: 20, 2: 20, 3: 20})
    sep = make_seeds("sep", {1: 19.8, 2: 20, 3: 20.3}, cost=3.0)
    words = report(dense, sep).verdict
    assert words.startswith("Over 3 seeds, sep reached validation loss 5.0000 with 0.751x (95% interval 0.728 to 0.77")
    assert "it took fewer FLOPs and less time; no difference in tokens is shown." in words
    assert words.endswith("Intervals are 95% by Student's t over pairs of runs of the same seed.")
    assert "one run of each" not in words
    noisy = make_seeds("noisy", {1: 10, 2: 20, 3: 40})
    assert "no difference in FLOPs, time or tokens is shown." in report(dense, noisy).verdict


def test_several_variants_are_not_corrected_and_that_is_said(make_seeds: Seeds) -> None:
    dense, sep = make_seeds("dense", {1: 20, 2: 20}), make_seeds("sep", {1: 21, 2: 22})
    found = report(dense, sep, make_seeds("late", {1: 30, 2: 31}), make_seeds("one", {1: 25}))
    assert "they are not corrected for the 2 variants compared" in found.verdict
    assert "one reached validation loss 5.0000 with 1.250x the FLOPs (flops/model), 1.250x the seconds" in found.verdict
    assert "Of one this is one run against one of dense: how much another seed would move" in found.verdict
    assert found.data()["corrected_for_rows"] is False


def test_a_seed_that_did_not_reach_the_loss_leaves_a_bound(make_seeds: Seeds) -> None:
    """Dense takes 10 steps; sep 20, 40 and more than its 40: ratios 2, 4, over 4, whose mean is over 32^(1/3)."""
    dense, sep = make_seeds("dense", {1: 10, 2: 10, 3: 10}), make_seeds("sep", {1: 20, 2: 40, 3: 80})
    found = report(dense, sep)
    ratio = found.reaches[1].ratios["tokens"]
    assert ratio.estimate is None and ratio.at_most is None
    assert ratio.seeds == [pytest.approx(2), pytest.approx(4), None]
    assert ratio.at_least == pytest.approx(32 ** (1 / 3))
    assert found.reaches[1].costs["tokens"] is None
    row = cells(found.console(), "To reach validation loss 5.0000")["sep"]
    assert row == ["3", "2 of 3 seeds reached it", "at least 3.175x", "", "at least 3.175x", "", "at least 3.175x"]
    assert (
        "2 of 3 seeds of sep reached validation loss 5.0000 within their budget, so no mean is claimed: over 3 seeds "
        "sep took on average at least 3.175x the FLOPs (flops/model), at least 3.175x the seconds and at least 3.175x "
        "the tokens of dense." in found.verdict
    )
    assert "over 40k" in found.markdown()


def test_a_reference_that_did_not_reach_the_loss_bounds_from_above(make_seeds: Seeds) -> None:
    """Sep takes 10 and 20 steps, dense 20 and more than 40: ratios 0.5 and below 0.5."""
    dense, sep = make_seeds("dense", {1: 20, 2: 80}), make_seeds("sep", {1: 10, 2: 20})
    ratio = report(dense, sep).reaches[1].ratios["tokens"]
    assert (ratio.estimate, ratio.at_least) == (None, None)
    assert ratio.at_most == pytest.approx(0.5)
    assert "1 of 2 seeds of dense reached validation loss 5.0000" in report(dense, sep).verdict


def test_nothing_bounds_a_pair_of_which_neither_reached_the_loss(make_seeds: Seeds) -> None:
    dense, sep = make_seeds("dense", {1: 20, 2: 80}), make_seeds("sep", {1: 10, 2: 80})
    found = report(dense, sep)
    assert (found.reaches[1].ratios["tokens"].at_least, found.reaches[1].ratios["tokens"].at_most) == (None, None)
    assert "and nothing bounds it." in found.verdict


def test_a_first_point_below_the_loss_bounds_too(make_seeds: Seeds) -> None:
    """Sep's second seed has it at its first validation, after 20 steps: at most 2, beside exactly 2."""
    late = [validation(20, 4.0), validation(40, 3.0)]
    dense, sep = make_seeds("dense", {1: 10, 2: 10}), make_seeds("sep", {1: 20, 2: late})
    found = report(dense, sep)
    assert found.reaches[1].ratios["tokens"].at_most == pytest.approx(2)
    assert found.reaches[1].ratios["tokens"].at_least is None
    assert cells(found.console(), "To reach validation loss 5.0000")["sep"][1:3] == [
        "at most 80 MFLOP",
        "at most 2.000x",
    ]
    assert "lies above a first validation point, so no mean is claimed" in found.verdict


def test_the_references_final_loss_is_taken_seed_by_seed(make_seeds: Seeds) -> None:
    """Dense ends at 2 and 4. Sep falls by 1 in 5 and 10 steps: 2 after 20, 4 after 20, of dense's 40 each."""
    dense, sep = make_seeds("dense", {1: 10, 2: 20}), make_seeds("sep", {2: 10, 1: 5})
    found = report(dense, sep, loss=REFERENCE)
    assert [(reach.target, reach.spent["tokens"]) for reach in found.reaches[1].runs] == [(4, 20_000), (2, 20_000)]
    estimate = found.reaches[1].ratios["tokens"].estimate
    assert estimate is not None and estimate.mean == pytest.approx(0.5)
    title = "To reach the final validation loss of dense of the same seed (mean 3.0000)"
    assert cells(found.console(), title)["dense"][1] == "160 MFLOP"
    assert found.data()["loss"] == "reference"


def test_a_seed_without_partner_has_no_final_loss_to_reach(make_seeds: Seeds) -> None:
    dense, sep = make_seeds("dense", {1: 10, 2: 20}), make_seeds("sep", {1: 5, 2: 10, 3: 10})
    found = report(dense, sep, loss=REFERENCE)
    assert [reach.seed for reach in found.reaches[1].runs] == [1, 2]
    assert any(note.startswith("Seed 3 of sep has no partner in dense") for note in found.notes)
    assert not any("different orders" in note for note in found.notes)


def test_rows_without_a_common_seed_are_not_compared(make_seeds: Seeds) -> None:
    dense, sep = make_seeds("dense", {1: 10, 2: 20}), make_seeds("sep", {3: 10, 4: 20})
    for loss in (5.0, REFERENCE):
        found = report(dense, sep, loss=loss)
        assert found.reaches[1].ratios["tokens"].estimate is None
        assert found.verdict == "sep has no seed in common with dense: nothing is said of it."
        assert cells(found.console(), "To reach")["sep"][2] == "-"
    assert "ratios.svg" not in found.files()


def test_means_and_bands_are_at_the_steps_all_seeds_share(make_seeds: Seeds) -> None:
    short = [validation(0, 6), validation(10, 5), validation(15, 4.8), validation(20, 4)]
    dense = make_seeds("dense", {1: short, 2: 20})
    row = read_variants([*dense, *make_seeds("sep", {1: 20})])[0]
    found = [(point.spent, point.loss, point.low, point.high) for point in mean_curve(row, "tokens")]
    assert found == [(0, 6, 6, 6), (10_000, 5.25, 5, 5.5), (20_000, 4.5, 4, 5)]


@pytest.fixture
def timing(tmp_path: Path) -> Callable[..., Path]:
    """Writes timing.json from {row: turns}; the median of the turns is the seconds of a step."""

    def write(turns: dict[str, list[float]], **machine: Any) -> Path:
        rows = {label: {"step_seconds": sorted(own)[len(own) // 2], "turns": own} for label, own in turns.items()}
        (tmp_path / "timing.json").write_text(json.dumps({"rows": rows, "machine": machine}))
        return tmp_path / "timing.json"

    return write


def test_timed_steps_replace_the_seconds(make_seeds: Seeds, timing: Callable[..., Path]) -> None:
    """Steps to the loss 10, 10 and 20, 20: twice the steps at 3/4 of the seconds. Turns' ratios 0.5, 0.75, 1.125
    are 0.75 times 1.5^-1, 1, 1.5; 1.5 exp(+- 4.302653 ln 1.5 / sqrt 3) = 1.5 exp(+- 1.007236)."""
    dense, sep = make_seeds("dense", {1: 10, 2: 10}), make_seeds("sep", {1: 20, 2: 20})
    path = timing({"dense": [4.0, 4.0, 4.0], "sep": [2.0, 3.0, 4.5]}, threads=2)
    found = report(dense, sep, timing=read_timing(path.parent))
    assert found.reaches[0].costs["seconds"] == pytest.approx(40)
    assert found.reaches[1].costs["seconds"] == pytest.approx(60)
    ratio = found.reaches[1].ratios["seconds"]
    assert ratio.seeds == pytest.approx([1.5, 1.5]) and ratio.estimate is not None
    assert (ratio.estimate.mean, ratio.estimate.high) == pytest.approx((1.5, 1.5 * math.exp(1.007236)), rel=1e-5)
    # FLOPs do not depend on the clock.
    assert found.reaches[1].ratios["flops/model"].estimate.low == pytest.approx(2)  # type: ignore[union-attr]
    console = unwrapped(found.console())
    assert "seconds (timed steps)" in console and "3 rounds of all variants in one process (threads 2)" in console
    assert "1.500x (95% interval 0.548 to 4.107) the timed seconds" in found.verdict
    assert cells(found.markdown(), "Timed steps")["sep"] == ["3", "0.750x [0.274, 2.054]", "3"]
    assert "(steps x timed seconds of a step)" in found.files()["loss_vs_seconds.svg"].decode()


def test_the_seconds_of_a_curriculum_are_summed_over_its_phases(make_seeds: Seeds, tmp_path: Path) -> None:
    """Both reach the loss after 10 steps: dense's are of 4 seconds, sep's 6 of 1 and 4 of 2, and 1.7 on average."""
    rows = {
        "dense": {"step_seconds": 4.0, "turns": [4.0]},
        "sep": {
            "step_seconds": 1.7,
            "turns": [1.7],
            "phases": [{"last": 6, "step_seconds": 1.0}, {"last": 20, "step_seconds": 2.0}],
        },
    }
    path = tmp_path / "timing.json"
    path.write_text(json.dumps({"rows": rows}))
    found = report(make_seeds("dense", {1: 10}), make_seeds("sep", {1: 10}), timing=read_timing(path))
    assert [row.costs["seconds"] for row in found.reaches] == pytest.approx([40, 14])
    assert found.reaches[1].ratios["seconds"].seeds == pytest.approx([14 / 40])
    assert "Those of sep are summed over phases that were timed apart." in " ".join(found.notes)
    for phases in ([{"last": 6}], [{"last": 0, "step_seconds": 1.0}], [{"last": 6, "step_seconds": 0}], [6], 6):
        rows["sep"]["phases"] = phases
        path.write_text(json.dumps({"rows": rows}))
        with pytest.raises(UserError, match="row 'sep': 'phases' need rising steps"):
            read_timing(path)


def test_a_timing_is_found_by_the_name_of_a_run_too(make_seeds: Seeds, timing: Callable[..., Path]) -> None:
    dense, sep = make_seeds("dense", {1: 10}), make_seeds("sep", {1: 20})
    found = report(dense, sep, timing=read_timing(timing({"dense_seed1": [2.0], "sep": [1.0]})))
    assert [row.costs["seconds"] for row in found.reaches] == pytest.approx([20, 20])
    # One turn and one seed: no interval.
    assert found.reaches[1].ratios["seconds"].estimate.low is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "does not hold a JSON object"),
        ('{"rows": {}}', "has no 'rows' object"),
        ('{"rows": {"dense": 3}}', "row 'dense' needs 'turns'"),
        ('{"rows": {"dense": {"step_seconds": 1, "turns": [1, 0]}}}', "a list of seconds above 0"),
        ('{"rows": {"dense": {"step_seconds": "1", "turns": [1]}}}', "needs 'step_seconds', a number above 0"),
        (
            '{"rows": {"dense": {"step_seconds": 1, "turns": [1]}, "sep": {"step_seconds": 1, "turns": [1, 1]}}}',
            "different numbers of turns (dense 1, sep 2)",
        ),
        ('{"rows": {"dense": {"step_seconds": 1, "turns": [1]}}}', "has no row 'sep': it holds dense."),
        (None, "does not exist: give --timing the file of a timing benchmark"),
    ],
)
def test_timing_files_that_do_not_serve(
    make_seeds: Seeds, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, words: str
) -> None:
    folders = [*make_seeds("dense", {1: 10}), *make_seeds("sep", {1: 20})]
    path = tmp_path / "timing.json"
    if content is not None:
        path.write_text(content)
    assert main([*map(str, folders), "--output", str(tmp_path / "out"), "--timing", str(path)]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and str(path) in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" and not (tmp_path / "out").exists()


def test_the_command_with_seeds_writes_pages_and_numbers(
    make_seeds: Seeds, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one broken seed is named and left out; every number of comparison.json is one, none is NaN."""
    dense, sep = make_seeds("dense", {1: 10, 2: 12}), make_seeds("sep", {1: 9, 2: 11, 3: []})
    arguments = [*map(str, dense + sep), "--output", str(tmp_path / "out"), "--loss", "reference"]
    assert main([*arguments, "--strict"]) == 2
    assert str(sep[2]) in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(arguments) == 0
    assert f"Left out: {sep[2] / 'metrics.jsonl'} has 0 validation points" in unwrapped(capsys.readouterr().out)
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [(row["label"], [run["seed"] for run in row["runs"]], row["pairs"]) for row in numbers["rows"]] == [
        ("dense", [1, 2], 2),
        ("sep", [1, 2], 2),
    ]
    # Dense ends at 2 and 2 2/3 after 40 steps; sep is there after 4 9 = 36 and 10/3 11 = 36.67.
    reached = numbers["to_reach"][1]
    assert reached["ratios"]["tokens"]["seeds"] == pytest.approx([36 / 40, 110 / 3 / 40])
    assert reached["ratios"]["tokens"]["estimate"]["n"] == 2
    assert numbers["reference"] == "dense" and numbers["confidence"] == 0.95
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "band: lowest to highest" in page and "quantile t of Student" in page and page.count("<svg") == 4
    assert (tmp_path / "out" / "ratios.svg").stat().st_size > 1000
    header, *lines = (tmp_path / "out" / "curves.csv").read_text().splitlines()
    assert header.startswith("row,run,seed,step,") and lines[-1].startswith("sep,sep_seed2,2,40,")


def test_a_loss_that_is_neither_number_nor_reference(dense: Path, sep: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(dense), str(sep), "--output", str(tmp_path / "out"), "--loss", "best"])
    assert stopped.value.code == 2

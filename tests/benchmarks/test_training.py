"""benchmarks/training.py in small: real models, real data, figures that follow from one another."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from tests.benchmarks.conftest import Program

BENCHMARK = "benchmarks.training"
SMALL = (
    *("--model", "demo", "--lengths", 256, "--rounds", 2, "--steps", 1, "--peak-tflops", 0.001),
    *("model.layers=2", "model.hidden=64", "model.ffn=128", "data.sample_vocabulary=4096", "data.workers=0"),
)


def test_figures_of_a_small_model(
    program: Program, tmp_path: Path, sample_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEPLLM_CACHE", str(sample_cache))
    output = tmp_path / "training.json"
    result = program(BENCHMARK, "--output", output, *SMALL)
    assert result.returncode == 0, result.stderr
    content = json.loads(output.read_text(encoding="utf8"))
    assert content["machine"]["packages"]["torch"] and content["settings"]["window"] == 64
    (row,) = content["results"]
    dense, sep = row["dense"], row["sep"]
    assert row["ratio"] == statistics.median(row["ratios"]) and len(row["ratios"]) == 2
    assert row["ratios"] == [slow / fast for slow, fast in zip(dense["rounds"], sep["rounds"], strict=True)]
    assert dense["attended_share"] == 1.0 > sep["attended_share"] > 0
    assert list(dense["backends"]) == ["dense"] and list(sep["backends"]) == ["masked"]
    for figures in (dense, sep):
        assert 256 / figures["tokens_per_second"] == pytest.approx(figures["step_seconds"])
        assert set(figures["seconds"]) == {"data_wait", "plan", "forward", "backward", "optimizer"}
        assert sum(figures["seconds"].values()) < 1.5 * figures["step_seconds"]
        assert figures["checkpoint_stall_seconds"] > 0 and figures["mfu"] > 0
    # More FLOPs in each of its seconds only as far as it does more of them.
    work = dense["mfu"] * dense["step_seconds"] / (sep["mfu"] * sep["step_seconds"])
    assert 1 < work < 1 / sep["attended_share"]


def test_mistakes_are_one_sentence(program: Program, tmp_path: Path) -> None:
    result = program(BENCHMARK, "--output", tmp_path / "missing" / "x.json")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --output ") and result.stderr.count("\n") == 1

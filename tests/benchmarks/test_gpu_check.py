"""scripts/gpu_check.py on a CPU, in small: every stage really runs its programs."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from tests.benchmarks.conftest import Program
from tests.support.triton_support import needs_triton

CHECK = "scripts/gpu_check.py"


@needs_triton
def test_correctness_in_the_interpreter(program: Program, tmp_path: Path) -> None:
    result = program(CHECK, "--output", tmp_path, "--stage", 1, "--device", "cpu")
    assert result.returncode == 0, result.stdout + (tmp_path / "correctness.log").read_text(encoding="utf8")
    machine, *cases = (tmp_path / "correctness.jsonl").read_text(encoding="utf8").splitlines()
    assert json.loads(machine)["machine"]["kernels"]
    assert len(cases) == 2
    for case in map(json.loads, cases):
        assert case["failures"] == [] and 0 < case["errors"]["dk"] < 1e-5


@pytest.mark.slow
def test_tiny_trainings(program: Program, tmp_path: Path, sample_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEPLLM_CACHE", str(sample_cache))
    result = program(CHECK, "--output", tmp_path, "--stage", 3, "--device", "cpu", "--tiny")
    assert result.returncode == 0, result.stdout + "".join(path.read_text() for path in tmp_path.glob("*.log"))
    training = json.loads((tmp_path / "training.json").read_text(encoding="utf8"))
    (row,) = training["throughput"]
    assert row["ratio"] == statistics.median(row["figures"]["ratios"])
    assert row["dense"] == row["figures"]["dense"]["tokens_per_second"] > 0 < row["sep"]
    for pattern in ("dense", "sep"):
        steps = [record["step"] for record in training["loss"][pattern]]
        assert steps == [0, 1, 2, 3, 4]
    assert training["loss"]["sep"][-1]["flops/model"] < training["loss"]["dense"][-1]["flops/model"]
    assert (tmp_path / "comparison" / "comparison.md").is_file()


def test_mistakes_are_one_sentence(program: Program, tmp_path: Path) -> None:
    result = program(CHECK, "--output", tmp_path, "--stage", 3, "--device", "cpu")
    assert result.returncode == 2
    assert result.stderr == "error: Stage 3 trains 160M parameters: on --device cpu add --tiny.\n"

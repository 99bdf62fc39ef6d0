"""The CPU benchmark runs, and measures what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.waiting import HANG_SECONDS


def _run(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.attention.cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, cwd=repository)


def test_figures_of_a_prepared_text(repository: Path, tmp_path: Path) -> None:
    classes = np.zeros(200, dtype=np.uint8)
    classes[9::10] = 4
    classes.tofile(tmp_path / "text.sep.bin")
    target = tmp_path / "figures.json"
    arguments = ["--lengths", "100", "--window", "8", "--rounds", "1", "--threads", "1", "--json", str(target)]
    result = _run(repository, *arguments, "--text", str(tmp_path / "text"))
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(target.read_text(encoding="utf8"))["rows"]
    # Every tenth token and the three initial ones.
    assert row["density"] == pytest.approx(0.13)
    assert 0 < row["share"] < 1
    assert row["blocked"] > 0 and row["dense"] > 0
    assert not list(tmp_path.glob("*.partial"))


def test_missing_text_is_one_sentence(repository: Path, tmp_path: Path) -> None:
    result = _run(repository, "--lengths", "64", "--text", str(tmp_path / "none"))
    assert result.returncode != 0
    assert "none.sep.bin does not exist" in result.stderr
    assert "Traceback" not in result.stderr

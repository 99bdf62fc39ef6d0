"""Recorded spills of the compile gate: which budget a version of Triton has, and what recording keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import ROOT
from benchmarks.attention.budgets import minor_version, read_budget, record_budget
from sepllm_train.base.errors import UserError

RECORDED = {"3.7": {"forward": 8}, "3.9": {"forward": 24}, "3.10": {}}


@pytest.fixture
def budget_file(tmp_path: Path) -> Path:
    """A file with the budgets RECORDED."""
    path = tmp_path / "budget.json"
    path.write_text(json.dumps(RECORDED), encoding="utf8")
    return path


@pytest.mark.parametrize(
    ("version", "used"),
    [
        ("3.7.1", "3.7"),
        ("3.9.0+git1a2b3c", "3.9"),
        ("3.10.2", "3.10"),
        ("3.8.0", "3.7"),
        ("3.6.0", "3.7"),
        ("3.11.0", "3.10"),
        ("4.0.0", "3.10"),
    ],
)
def test_a_version_has_its_own_budget_or_the_nearest(budget_file: Path, version: str, used: str) -> None:
    assert read_budget(budget_file, version) == (used, RECORDED[used])


def test_no_file_is_an_empty_budget(tmp_path: Path) -> None:
    assert read_budget(tmp_path / "none.json", "3.8.0") == ("3.8", {})


def test_recording_keeps_the_other_versions(budget_file: Path) -> None:
    record_budget(budget_file, "3.8.0", {"backward_q": 4})
    record_budget(budget_file, "3.9.1", {})
    content = json.loads(budget_file.read_text(encoding="utf8"))
    assert content == {"3.7": {"forward": 8}, "3.8": {"backward_q": 4}, "3.9": {}, "3.10": {}}
    assert list(content) == ["3.7", "3.8", "3.9", "3.10"]


def test_a_file_in_another_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    path.write_text('{"triton": "3.7.1", "spills": {}}', encoding="utf8")
    with pytest.raises(UserError, match="does not list budgets by Triton version: delete it and run with --record"):
        read_budget(path, "3.7.1")


def test_the_shipped_file_has_every_supported_version() -> None:
    shipped = json.loads((ROOT / "benchmarks" / "attention" / "sm90_budget.json").read_text(encoding="utf8"))
    assert list(shipped) == ["3.6", "3.7", "3.8", "3.9"]
    assert all(minor_version(version) == version for version in shipped)

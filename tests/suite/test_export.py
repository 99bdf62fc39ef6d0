"""Exported studies: what they hold, the report made again from one, and a suite that continues from one."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from sepllm_train.base.errors import UserError
from sepllm_train.suite.export import RUNS, SUMMARY, export, is_study, unpack
from sepllm_train.suite.main import run_suite
from sepllm_train.suite.plan import read_plan
from sepllm_train.suite.report import write_suite_report
from tests.suite.test_plan import suite as suite_config

RUN = "sep_128_seed1"


@pytest.fixture
def old(golden_files: Path) -> Path:
    """An export of an older version, laid out as a suite."""
    return golden_files / "suite" / "paper-toy"


@pytest.fixture
def study(old: Path, tmp_path: Path) -> Path:
    """The old export, reported and exported again."""
    suite = tmp_path / "suites" / old.name
    shutil.copytree(old, suite)
    plan = read_plan(suite)
    write_suite_report(plan)
    export(plan, tmp_path / "studies" / old.name, ["loss_vs_flops"])
    return tmp_path / "studies" / old.name


def test_a_study_holds_all_that_was_recorded(study: Path, old: Path, tmp_path: Path) -> None:
    assert {path.name for path in study.iterdir()} == {"README.md", "report.md", "summary.json", "runs.jsonl.gz", "128"}
    unpack(study, tmp_path / "again")
    for path in (path for path in old.rglob("*") if path.is_file() and "report" not in path.parts):
        copy = tmp_path / "again" / path.relative_to(old)
        assert copy.read_bytes() == path.read_bytes(), path
    records = [json.loads(line) for line in gzip.decompress((study / RUNS).read_bytes()).splitlines()]
    assert [record.keys() for record in records] == [{"name", "config", "environment", "run", "metrics"}] * 2
    assert json.loads((study / SUMMARY).read_text())["report"]["128"]["reference"] == "dense"


def test_a_report_from_a_study_changes_nothing_in_it(study: Path) -> None:
    (study / "README.md").write_text("edited\n")
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    (study / "report.md").unlink()
    run_suite(suite_config("+suite=paper", "suite.size=toy", f"suite.root={study.parent}", "suite.do=[report]"))
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before


def test_a_study_holds_the_named_figures_and_keeps_those_it_has(study: Path) -> None:
    def figures() -> set[str]:
        return {path.stem for path in study.rglob("*.svg")}

    def report(name: str) -> None:
        words = ("+suite=paper", "suite.size=toy", f"suite.root={study.parent}", "suite.do=[report]")
        run_suite(suite_config(*words, f"suite.figures=[{name}]"))

    assert figures() == {"loss_vs_flops"}
    report("loss_vs_tokens")
    assert figures() == {"loss_vs_flops", "loss_vs_tokens"}
    with pytest.raises(UserError, match="suite.figures=loss_vs_time"):
        report("loss_vs_time")


def test_a_suite_continues_from_a_study(study: Path, old: Path) -> None:
    unpack(study, study)
    assert not is_study(study) and read_plan(study).runs == read_plan(old).runs
    assert (study / "runs" / RUN / "metrics.jsonl").read_bytes() == (old / "runs" / RUN / "metrics.jsonl").read_bytes()


def test_a_damaged_study_is_named(study: Path, tmp_path: Path) -> None:
    (study / RUNS).write_bytes((study / RUNS).read_bytes()[:-100])
    with pytest.raises(UserError, match=r"runs.jsonl.gz cannot be unpacked \(.*\): restore it"):
        unpack(study, tmp_path / "again")

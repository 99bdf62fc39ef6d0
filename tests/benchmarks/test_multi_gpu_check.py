"""benchmarks/multi_gpu end to end with two CPU processes over gloo; its plan and its verdicts by themselves."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.multi_gpu import verdicts
from benchmarks.multi_gpu.cases import GIB, STAGES, Case, RunSpec, all_cases, cpu_scale, fitting, gpu_scale
from benchmarks.multi_gpu.kit import Kit
from benchmarks.multi_gpu.plan import estimate, launches_of, within_budget
from benchmarks.multi_gpu.report import render
from benchmarks.multi_gpu.results import Results
from benchmarks.multi_gpu.verdicts import BARS, judge
from sepllm_train.base.errors import EXIT_INTERRUPTED, UserError
from sepllm_train.config.load import configuration_of
from sepllm_train.config.validate import validate
from tests.benchmarks.conftest import Program
from tests.support.waiting import HANG_SECONDS

GPU = gpu_scale(80 * GIB)
Rehearse = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def kit(repository: Path, sample_cache: Path) -> Rehearse:
    """Runs the program."""

    def run(*arguments: object, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.multi_gpu", *map(str, arguments)]
        environment = os.environ | {"SEPLLM_CACHE": str(sample_cache), "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment, cwd=repository, check=False
        )

    return run


@pytest.fixture(scope="module")
def rehearsal(kit: Rehearse, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a whole rehearsal."""
    folder = tmp_path_factory.mktemp("rehearsal")
    result = kit("--cpu", "--output", folder, "--budget-minutes", 60, seconds=HANG_SECONDS)
    logs = "".join(path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("logs/*.log")))
    assert result.returncode == 0, result.stdout + result.stderr + logs
    assert result.stdout.splitlines()[-1] == f"Please send back this one file: {folder}/results.json"
    return folder


def read(folder: Path) -> dict[str, Any]:
    """results.json of a folder."""
    return json.loads((folder / "results.json").read_text(encoding="utf8"))


@pytest.mark.slow
@pytest.mark.distributed
def test_rehearsal_passes_every_case(rehearsal: Path) -> None:
    content = read(rehearsal)
    cases = all_cases(2, cpu_scale())
    assert list(content["cases"]) == [case.id for case in cases]
    assert {case.stage for case in cases} == set(STAGES)
    assert content["counts"] == {"passed": len(cases), "failed": 0, "skipped": 0}
    assert content["rehearsal"] and content["processes"] == 2
    assert not (rehearsal / "work").exists()  # checkpoints nobody resumes from


@pytest.mark.slow
@pytest.mark.distributed
def test_rehearsal_compares_layouts_with_one_process(rehearsal: Path) -> None:
    records = {id: record for id, record in read(rehearsal)["cases"].items() if record["stage"] == "layouts"}
    assert len(records) == 2 * (1 + len(fitting(2)))
    for id, record in records.items():
        found, expected = record["runs"]["run"], records[f"layouts/one GPU, {record['precision']}"]["runs"]["run"]
        assert len(found["losses"]) == cpu_scale().steps == len(set(found["losses"])), id
        for key, bar in zip(("losses", "norms"), BARS[record["precision"]], strict=True):
            assert found[key] == pytest.approx(expected[key], rel=bar), id
            assert "one GPU" in id or record["figures"][f"{key}_difference"] <= bar
    tensor = records["layouts/tensor 2, fp32"]["runs"]["run"]
    assert tensor["norms"] != records["layouts/one GPU, fp32"]["runs"]["run"]["norms"]  # another order of sums


@pytest.mark.slow
@pytest.mark.distributed
def test_rehearsal_resumes_kills_and_times(rehearsal: Path) -> None:
    cases = read(rehearsal)["cases"]
    for record in cases.values():
        if record["stage"] == "resume" and " to " not in record["name"]:
            assert record["runs"]["again"]["digest"] == record["runs"]["whole"]["digest"]
    kill = cases["kill/SIGKILL, SIGTERM, SIGUSR1"]["runs"]
    ends = {event["signal"]: event["code"] for event in kill["events"]}
    assert ends["SIGKILL"] in verdicts.KILLED and ends["SIGTERM"] == ends["SIGUSR1"] == EXIT_INTERRUPTED
    # In no order: a run continues from the checkpoint before the signal, and may meet the next one at an earlier step.
    assert all(0 < event["step"] < cpu_scale().kill_steps for event in kill["events"])
    assert kill["digest"] == kill["expected_digest"]
    overlap = cases["overlap/losses, data"]["runs"]
    assert overlap["overlap_true"]["losses"] == overlap["overlap_false"]["losses"]
    for record in cases.values():
        for run in record["runs"].values() if record["stage"] in ("scaling", "throughput") else ():
            assert len(run["seconds"]) == cpu_scale().rounds and run["tokens_per_second"] > 0
    one, two = (cases[f"scaling/{name}, 4 micro-batches a step"]["figures"] for name in ("1 GPU", "2 GPUs"))
    assert two["efficiency"] == pytest.approx(two["tokens_per_second"] / one["tokens_per_second"] / 2)


@pytest.mark.slow
@pytest.mark.distributed
def test_rerun_keeps_finished_cases(kit: Rehearse, rehearsal: Path) -> None:
    before = read(rehearsal)["cases"]
    result = kit("--cpu", "--output", rehearsal, "--stages", "layouts", "kill", seconds=HANG_SECONDS)
    assert result.returncode == 0 and "\n0 cases to run" in result.stdout, result.stdout + result.stderr
    assert read(rehearsal)["cases"] == before
    assert "## kill" in (rehearsal / "report.md").read_text(encoding="utf8")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_failed_case_is_recorded_and_the_rest_runs(
    sample_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEPLLM_CACHE", str(sample_cache))
    bad, good = (case for case in all_cases(2, cpu_scale()) if case.name.startswith("one GPU"))
    bad = replace(bad, runs=(RunSpec("run", (*bad.runs[0].overrides, "model.heads=7")),))
    results = Results(tmp_path / "results.json", "code", "machine")
    Kit(tmp_path, [bad, good], results, cpu_scale(), {}, 3600).run()
    failed, passed = (results.cases[case.id] for case in (bad, good))
    assert failed["status"] == "failed" and "model.heads=7" in failed["message"], failed["message"]
    assert passed["status"] == "passed", passed["message"]
    assert json.loads(results.path.read_text())["counts"] == {"passed": 1, "failed": 1, "skipped": 0}


def test_fewer_than_two_gpus_are_refused(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = program("benchmarks.multi_gpu", "--output", tmp_path / "results")
    assert result.returncode == 2
    assert result.stderr.startswith("error: two or more GPUs are needed, torch finds no GPU")
    assert "--cpu" in result.stderr and result.stderr.count("\n") == 1


def test_finished_cases_are_those_of_the_same_code_and_machine(tmp_path: Path) -> None:
    case = all_cases(2, cpu_scale())[1]
    results = Results(tmp_path / "results.json", "code", "machine")
    results.put(case, {"status": "passed", "message": "", "runs": {}})
    for code, machine, expected in (("code", "machine", True), ("other", "machine", False), ("code", "other", False)):
        again = Results(results.path, code, machine)
        again.load()
        assert again.finished(case) is expected
    changed = replace(case, runs=(RunSpec("run", ("training.steps=9",)),))
    assert results.finished(case) and not results.finished(changed)
    results.put(case, {"status": "failed", "message": "", "runs": {}})
    assert not results.finished(case)


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for content in ("[]", "{", '{"format": 1, "cases": [1]}', "[" * 100_000):
        path.write_text(content)
        with pytest.raises(UserError, match="not a results file"):
            Results(path, "code", "machine").load()


def test_plan_of_eight_gpus_fits_twenty_minutes() -> None:
    cases = all_cases(8, GPU)
    assert len({case.id for case in cases}) == len(cases)
    assert within_budget(cases, 20 * 60, GPU.launch_seconds) == (cases, [])
    assert estimate(cases, GPU.launch_seconds) < 20 * 60
    launches = launches_of(cases)
    assert sorted(case.id for launch in launches for case in launch.cases) == sorted(case.id for case in cases)
    for launch in launches:
        assert {case.processes for case in launch.cases} == {launch.processes}
    ran: set[str | None] = {None}
    for case in (case for launch in launches for case in launch.cases):
        assert case.baseline_id in ran
        ran.add(case.id)


@pytest.mark.parametrize("minutes", [0, 2, 5, 10])
def test_plan_leaves_the_least_important_cases_out(minutes: int) -> None:
    cases = all_cases(8, GPU)
    chosen, left_out = within_budget(cases, 60 * minutes, GPU.launch_seconds)
    assert [case for case in cases if case in chosen or case in left_out] == cases and left_out
    assert estimate(chosen, GPU.launch_seconds) <= 60 * minutes
    names = {case.id for case in chosen}
    assert all(case.baseline_id in names | {None} for case in chosen)
    if minutes == 10:
        stages = {case.stage for case in chosen}
        assert {"environment", "layouts", "resume", "kill", "overlap"} <= stages
        assert all(case in chosen for case in cases if case.priority <= 3)
        assert min(case.priority for case in left_out) > 3


def test_every_configuration_is_sound() -> None:
    # fp32 stands for both precisions: the keys are the same.
    runs = [(case, run) for case in all_cases(8, GPU) for run in case.runs if not case.name.endswith(", bf16")]
    configurations = {(case.processes, run.overrides) for case, run in runs}
    for count, overrides in sorted(configurations):
        validate(configuration_of([override.replace("{runs}", "runs") for override in overrides]), count)


@pytest.fixture
def layout() -> tuple[Case, dict[str, Any], dict[str, Any]]:
    """A case, what its run gave, and the record of one GPU."""
    case = next(case for case in all_cases(2, GPU) if case.id == "layouts/tensor 2, fp32")
    run = {"losses": [8.5, 8.2, 8.1], "norms": [2.0, 1.9, 1.8]}
    return case, {"run": copy.deepcopy(run)}, {"status": "passed", "runs": {"run": run}}


def test_equal_losses_pass(layout: tuple[Case, dict[str, Any], dict[str, Any]]) -> None:
    case, runs, baseline = layout
    assert judge(case, runs, baseline).message == "bitwise equal" and judge(case, runs, baseline).status == "passed"
    runs["run"]["norms"][1] *= 1 + 9e-6
    verdict = judge(case, runs, baseline)
    assert verdict.status == "passed" and verdict.figures["norms_difference"] == pytest.approx(9e-6, rel=1e-3)


@pytest.mark.parametrize("key", ["losses", "norms"])
@pytest.mark.parametrize("wrong", [8.2 * (1 + 2e-5), float("nan"), None])
def test_a_wrong_value_fails(
    layout: tuple[Case, dict[str, Any], dict[str, Any]], key: str, wrong: float | None
) -> None:
    case, runs, baseline = layout
    runs["run"][key][1] = wrong
    verdict = judge(case, runs, baseline)
    assert verdict.status == "failed" and "from step 2 on, the bar is 1.0e-05" in verdict.message


def test_a_missing_step_or_baseline_fails(layout: tuple[Case, dict[str, Any], dict[str, Any]]) -> None:
    case, runs, baseline = layout
    del runs["run"]["losses"][-1]
    assert judge(case, runs, baseline).status == "failed"
    assert judge(case, runs, None).message == "nothing to compare with: one GPU, fp32 has not passed"


def test_another_digest_fails() -> None:
    case = next(case for case in all_cases(2, GPU) if case.id == "resume/data, fp32")
    whole = {"losses": [8.5, 8.2], "norms": [2.0, 1.9], "digest": "a" * 64}
    again = {"losses": [8.2], "norms": [1.9], "digest": "a" * 64}
    assert judge(case, {"whole": whole, "again": again}, None).status == "passed"
    verdict = judge(case, {"whole": whole, "again": {**again, "digest": "b" * 64}}, None)
    assert verdict.status == "failed" and "digest bbbbbbbbbbbb, uninterrupted aaaaaaaaaaaa" in verdict.message


@pytest.mark.parametrize(
    ("code", "digest", "expected"),
    [(75, "a", "passed"), (143, "a", "failed"), (None, "a", "failed"), (75, "b", "failed")],
)
def test_a_signal_must_end_the_run_as_documented(code: int | None, digest: str, expected: str) -> None:
    case = next(case for case in all_cases(2, GPU) if case.kind == "kill")
    event = {"signal": "SIGTERM", "step": 7, "code": code, "seconds": 1.0}
    runs = {"events": [event], "digest": digest, "expected_digest": "a"}
    assert judge(case, runs, None).status == expected


def test_report_shows_what_failed(layout: tuple[Case, dict[str, Any], dict[str, Any]]) -> None:
    record = {"stage": "layouts", "name": "tensor 2", "processes": 2, "seconds": 3.0}
    cases = {
        "a": {**record, "status": "passed", "message": "fine"},
        "b": {**record, "status": "failed", "message": "x|y"},
    }
    text = render({"rehearsal": True, "summary": {"machine": "2 x GPU"}}, cases)
    assert "it checks the kit, not the GPUs" in text and "1 passed, 1 failed, 0 skipped." in text
    assert "FAILED | x/y" in text

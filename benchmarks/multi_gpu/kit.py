"""Runs the cases of a plan, launch by launch, and keeps their records."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.multi_gpu.cases import Case, Scale
from benchmarks.multi_gpu.kill import Killing, OutOfTime, last_line
from benchmarks.multi_gpu.plan import LaunchGroup, estimate, launches_of, within_budget
from benchmarks.multi_gpu.results import FAILED, PASSED, SKIPPED, Results
from benchmarks.multi_gpu.verdicts import Verdict, judge
from sepllm_train.base.console import duration
from sepllm_train.base.errors import UserError, first_line
from sepllm_train.cli.environment import advice, self_test
from sepllm_train.distributed.processes import logged_process

START_PATIENCE = 10  # times the seconds of a launch
POLL_SECONDS = 0.05


class Kit:
    """One call of the program: `cases` that are to be run within `seconds`, their records in `results`."""

    def __init__(
        self, output: Path, cases: Sequence[Case], results: Results, scale: Scale, facts: dict[str, Any], seconds: float
    ) -> None:
        self.output = output
        self.cases = list(cases)
        self.results = results
        self.scale = scale
        self.facts = facts
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self.budget = seconds
        self.left: list[Case] = []
        self.total = 0
        self.planned = 0.0
        self.logs = output / "logs"
        self.work = output / "work"
        self.environment = os.environ | {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            # As the Slurm scripts set it: with it tensor parallelism overlaps as megatron-core means it to.
            "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1"),
            # Before cuBLAS is first used, as deterministic runs need it.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }
        if scale.device == "cpu":
            self.environment["CUDA_VISIBLE_DEVICES"] = ""
        set_here = {name: value for name, value in self.environment.items() if os.environ.get(name) != value}
        results.header["variables_of_the_runs"] = set_here
        # The launches run this checkout's code from any folder.
        paths = (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

    def run(self) -> None:
        """Run every case that fits the budget; what does not gets a record that gives the reason."""
        self.logs.mkdir(parents=True, exist_ok=True)
        kept = frozenset(case.id for case in self.cases if self.results.finished(case))
        wanted = [case for case in self.cases if case.id not in kept]
        chosen, left_out = within_budget(wanted, self.budget, self.scale.launch_seconds, kept)
        for case in left_out:
            reason = f"left out: the budget of {duration(self.budget)} is planned for more important cases"
            self.results.put(case, {"status": SKIPPED, "message": reason})
        self.left, self.total = chosen, len(chosen)
        self.planned = estimate(chosen, self.scale.launch_seconds)
        print(
            f"{len(chosen)} cases to run, about {duration(self.planned)}"
            + (f"; {len(kept)} are finished already" if kept else "")
            + (f"; {len(left_out)} do not fit the budget" if left_out else ""),
            flush=True,
        )
        kinds: dict[str, Callable[[LaunchGroup], None]] = {
            "environment": self._environment,
            "kill": self._kill,
            "worker": self._worker,
        }
        try:
            while launches := self._replanned():
                launch = launches[0]
                try:
                    kinds[launch.kind](launch)
                except UserError:
                    raise
                except Exception as error:
                    # A fault of the kit itself costs one case, not the others.
                    self._failed(launch, f"{type(error).__name__}: {first_line(error)}")
        finally:
            shutil.rmtree(self.work, ignore_errors=True)

    def _replanned(self) -> list[LaunchGroup]:
        """Launches of the cases that are left and still fit, at the pace so far; the others are skipped."""
        pace = max(1.0, self._pace())
        seconds = max(0.0, self.deadline - time.monotonic()) / pace
        passed = frozenset(id for id, record in self.results.cases.items() if record["status"] == PASSED)
        chosen, left_out = within_budget(self.left, seconds, self.scale.launch_seconds, passed)
        for case in left_out:
            reason = f"left out: {duration(time.monotonic() - self.began)} of {duration(self.budget)} were used by then"
            self._finish(case, Verdict(SKIPPED, f"{reason}, {pace:.1f} times the estimate"), {}, 0.0)
        return launches_of(chosen)

    def _pace(self) -> float:
        """Seconds so far over their estimate."""
        expected = self.planned - estimate(self.left, self.scale.launch_seconds)
        return (time.monotonic() - self.began) / expected if expected > 0 else 1.0

    def _failed(self, launch: LaunchGroup, reason: str) -> None:
        """Record the first case of a launch that has no record yet as failed."""
        left = {case.id for case in self.left}
        for case in [case for case in launch.cases if case.id in left][:1]:
            self._finish(case, Verdict(FAILED, reason), {}, 0.0)

    def _environment(self, launch: LaunchGroup) -> None:
        """Facts of the machine and an all-reduce over its GPUs."""
        (case,) = launch.cases
        begin = time.monotonic()
        cpu = self.scale.device == "cpu"
        tests = self_test(1 if cpu else 256, 0 if cpu else case.processes)
        text = advice({**self.facts, "self_test": tests})
        runs = {"facts": self.facts, "self_test": tests, "advice": text}
        self._finish(case, judge(case, runs, None), runs, time.monotonic() - begin)

    def _kill(self, launch: LaunchGroup) -> None:
        """The run that is disturbed."""
        (case,) = launch.cases
        begin = time.monotonic()
        patience = max(self.scale.slack * self.scale.train_seconds, 2 * self.scale.launch_seconds, 90)
        launcher = tuple(self._launcher(case.processes))
        folder = self.work / "kill"
        killing = Killing(case, launcher, folder, self.logs, self.environment, patience, self.deadline)
        try:
            runs = killing.run()
        except OutOfTime:
            self._over_budget(case)
            return
        self._finish(case, judge(case, runs, None), runs, time.monotonic() - begin)

    def _worker(self, launch: LaunchGroup) -> None:
        """Cases in as many launches of the worker as it takes: a new one after each case that fails."""
        cases = list(launch.cases)
        attempts = 0
        while cases:
            if self._over_budget(cases[0]):
                cases.pop(0)
                continue
            attempts += 1
            folder = self.work / f"{launch.processes}-{launch.cases[0].kind}-{attempts}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]), encoding="utf8")
            done = self._watch(folder, cases, self.logs / f"{folder.name}.log")
            cases = cases[done:]

    def _watch(self, folder: Path, cases: list[Case], log: Path) -> int:
        """One launch of the worker: record cases as they end; how many of `cases` have a record afterwards."""
        command = [*self._launcher(cases[0].processes), "-m", "benchmarks.multi_gpu.worker", str(folder)]
        number, since = 0, time.monotonic()
        with logged_process(command, log, environment=self.environment) as process:
            while number < len(cases):
                case, path = cases[number], folder / f"{number}.json"
                ended = process.poll() is not None
                if path.exists():
                    content = json.loads(path.read_text(encoding="utf8"))
                    self._judge(case, content["runs"], content["seconds"])
                    number, since = number + 1, time.monotonic()
                    continue
                took = time.monotonic() - since
                patience = max(60.0, self.scale.slack * case.seconds)
                if not (folder / "ready").exists() or number == 0:
                    patience += START_PATIENCE * self.scale.launch_seconds
                if ended or took > patience:
                    errors = sorted(folder.glob(f"{number}.rank*.error"))
                    text = errors[0].read_text(encoding="utf8") if errors else last_line(log)
                    reason = text if ended else f"no end within {duration(patience)}: {text}"
                    verdict = Verdict(FAILED, f"{reason} (logs/{log.name})")
                    self._finish(case, verdict, {}, took)
                    return number + 1
                if time.monotonic() > self.deadline:
                    return number
                time.sleep(POLL_SECONDS)
        # All cases are recorded: the launch is ended, not waited for.
        return number

    def _judge(self, case: Case, runs: dict[str, Any], seconds: float) -> None:
        """Compare what a case gave with its baseline and record both."""
        baseline = self.results.cases.get(case.baseline_id or "")
        passed = baseline if baseline is not None and baseline["status"] == PASSED else None
        self._finish(case, judge(case, runs, passed), runs, seconds)

    def _over_budget(self, case: Case) -> bool:
        """Record the case as skipped if the budget is used up; False while it is not."""
        if time.monotonic() <= self.deadline:
            return False
        took = duration(time.monotonic() - self.began)
        reason = f"left out: the budget of {duration(self.budget)} was used up after {took}"
        self._finish(case, Verdict(SKIPPED, reason), {}, 0.0)
        return True

    def _finish(self, case: Case, verdict: Verdict, runs: dict[str, Any], seconds: float) -> None:
        """Record a case and print its line."""
        self.left = [other for other in self.left if other.id != case.id]
        record = {
            "status": verdict.status,
            "message": verdict.message,
            "seconds": round(seconds, 2),
            "figures": verdict.figures,
            "runs": runs,
        }
        self.results.put(case, record)
        number = self.total - len(self.left)
        print(
            f"[{number}/{self.total}] {case.stage}: {case.name} | {verdict.status}, {verdict.message} | "
            f"{duration(seconds)} | about {duration(self._time_left())} left",
            flush=True,
        )

    def _time_left(self) -> float:
        """Seconds for the cases that are left, at the pace so far."""
        return estimate(self.left, self.scale.launch_seconds) * self._pace()

    def _launcher(self, processes: int) -> list[str]:
        """The project's torchrun for that many processes."""
        module = "sepllm_train.distributed.torchrun"
        return [sys.executable, "-m", module, "--standalone", f"--nproc-per-node={processes}"]

"""Trains the runs of a plan, several at a time, each in a process of its own that continues where it was stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from data_prep.tokenize import usable_cores
from sepllm_train.base.console import duration, say
from sepllm_train.base.errors import EXIT_INTERRUPTED, Interrupted, UserError
from sepllm_train.base.signals import STOPPING, heeded
from sepllm_train.config.overrides import literal
from sepllm_train.distributed.processes import end_with_parent
from sepllm_train.suite.plan import Plan, PlannedRun, data_overrides, finished

# Seconds between looks at the processes, and between lines of progress.
_LOOK = 0.5
_TELL = 60.0


@dataclass
class RunningJob:
    """A run that is being trained; `log` is what it prints."""

    run: PlannedRun
    process: subprocess.Popen[bytes]
    log: Path


def train_runs(plan: Plan, runs: Sequence[PlannedRun], jobs: int) -> None:
    """Train those of `runs` that are not finished, `jobs` at a time, in their order.

    A run that fails does not stop the others; at the end UserError names those that did. When the suite is stopped
    (Interrupted), the runs get a signal, and save first.
    """
    waiting = [run for run in runs if not finished(plan, run)]
    say(f"{len(runs)} runs, {len(runs) - len(waiting)} finished before; {jobs} at a time")
    progress = _Progress(plan, waiting)
    running: list[RunningJob] = []
    failed: list[RunningJob] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(plan, waiting.pop(0), jobs))
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                _ended(job, failed)
                progress.tell(running, now=True)
            progress.tell(running)
            time.sleep(_LOOK)
    finally:
        _stop(plan, running)
    if failed:
        names = "; ".join(f"{job.run.name} ({_last_line(job.log)})" for job in failed)
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed: {names}. Their output is in {plan.folder}/logs; "
            "suite.do=[time,evaluate,report] goes on with the others."
        )


def command_of(plan: Plan, run: PlannedRun) -> list[str]:
    """The command that trains a run."""
    return [
        *launcher(plan.processes),
        "-m",
        "sepllm_train",
        "pretrain",
        *run.overrides,
        *data_overrides(plan.prefix),
        f"run_root={literal(str(plan.run_root))}",
        f"name={run.name}",
    ]


def launcher(processes: int) -> list[str]:
    """Words that start a Python program in so many processes."""
    several = ["-m", "sepllm_train.distributed.torchrun", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(several if processes > 1 else [])]


def environment(jobs: int, processes: int = 1) -> dict[str, str]:
    """Environment of a run: its share of the cores, unless OMP_NUM_THREADS says otherwise."""
    share = max(1, usable_cores() // (jobs * processes))
    return {"OMP_NUM_THREADS": str(share), **os.environ}


def _start(plan: Plan, run: PlannedRun, jobs: int) -> RunningJob:
    log = plan.folder / "logs" / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command_of(plan, run),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(jobs, plan.processes),
            preexec_fn=end_with_parent,
        )
    return RunningJob(run, process, log)


def _ended(job: RunningJob, failed: list[RunningJob]) -> None:
    """Tell how a run ended."""
    code = job.process.returncode
    if code == 0:
        say(f"finished {job.run.name}: {_last_validation(job.log)}")
        return
    failed.append(job)
    why = "was interrupted" if code == EXIT_INTERRUPTED else f"failed with code {code}"
    say(f"warning: {job.run.name} {why}: {_last_line(job.log)}")


def _stop(plan: Plan, running: Sequence[RunningJob]) -> None:
    """Let the runs save and wait for them."""
    if not running:
        return
    say(f"stopping {len(running)} runs, which save first")
    for job in running:
        # torchrun leaves SIGTERM to its workers, which do not get it from here by themselves.
        own = psutil.Process(job.process.pid) if job.process.poll() is None else None
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [] if own is None else own.children() if plan.processes > 1 else [own]:
                process.send_signal(signal.SIGTERM)
    for job in running:
        job.process.wait()


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted in the block at the first of the signals that stop a run; later ones change nothing."""

    def stop(number: int, frame: Any) -> None:
        for other in STOPPING:
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(f"{signal.Signals(number).name} stopped the suite: the same command continues it.")

    before = {number: signal.signal(number, stop) for number in heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf8", errors="replace").strip().splitlines() or ["nothing was printed"]


def _last_line(log: Path) -> str:
    return _lines(log)[-1]


def _last_validation(log: Path) -> str:
    return next((line for line in reversed(_lines(log)) if line.startswith("validation")), _last_line(log))


class _Progress:
    """Tells every minute how far the runs are, and when they will be done at the rate so far."""

    def __init__(self, plan: Plan, runs: Sequence[PlannedRun]) -> None:
        self.plan = plan
        self.runs = list(runs)
        # Attention makes a token of a longer sequence dearer; this is only for the estimate.
        self.total = sum(run.steps for run in runs)
        self.before = self._done()
        self.began = time.perf_counter()
        self.shown = self.began

    def tell(self, running: Sequence[RunningJob], now: bool = False) -> None:
        """A line, when one is due."""
        if not now and time.perf_counter() - self.shown < _TELL:
            return
        self.shown = time.perf_counter()
        done = self._done()
        # A run that was killed goes back to its checkpoint.
        self.before = min(self.before, done)
        fresh = done - self.before
        left = "" if not fresh else f", about {duration((self.shown - self.began) / fresh * (self.total - done))} left"
        names = ", ".join(f"{job.run.name} {self._step(job.run)}/{job.run.steps}" for job in running)
        say(f"{done:,} of {self.total:,} steps ({done / max(1, self.total):.0%}){left}{' | ' if names else ''}{names}")

    def _done(self) -> int:
        return sum(self._step(run) for run in self.runs)

    def _step(self, run: PlannedRun) -> int:
        """Steps that a run has logged."""
        try:
            with (self.plan.run_root / run.name / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                lines = file.read().splitlines()
            return int(json.loads(lines[-1])["step"])
        except (OSError, ValueError, KeyError, IndexError):
            return 0

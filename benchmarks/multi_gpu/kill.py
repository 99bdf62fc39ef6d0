"""A run through its command line that is killed, stopped by two signals, and resumed each time."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.multi_gpu.cases import Case
from sepllm_train.distributed.processes import children_of, logged_process, send

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
PROGRAM = "sepllm_train"


class Stuck(Exception):
    """A launch that failed or did nothing for too long."""


class OutOfTime(Exception):
    """The budget was used up before the case had ended."""


@dataclass
class Killing:
    """The launches of the kill case. A launch may take `seconds` to its end after a signal, and twice that otherwise.

    `deadline`: when the budget is used up, by `time.monotonic`.
    """

    case: Case
    launcher: tuple[str, ...]
    folder: Path
    logs: Path
    environment: Mapping[str, str]
    seconds: float
    deadline: float

    def run(self) -> dict[str, Any]:
        """Train undisturbed, then disturb and resume: events, both digests, or `error` with what went wrong.

        Raises OutOfTime.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        events: list[dict[str, Any]] = []
        try:
            self._to_the_end("undisturbed")
            events.extend(self._disturb(number, name) for number, name in enumerate(SIGNALS, 1))
            self._to_the_end("disturbed")
            # Imported late: it takes seconds, and only this case needs it.
            from sepllm_train.training.checkpoint import digest

            found, expected = digest(self.folder / "disturbed"), digest(self.folder / "undisturbed")
        except Stuck as error:
            return {"events": events, "error": str(error)}
        return {"events": events, "digest": found, "expected_digest": expected}

    def _to_the_end(self, name: str) -> None:
        """Train to the last step. Raises Stuck when that fails."""
        log = self._log(f"{name}-end")
        with self._start(name, log) as process:
            code = self._wait(process, 2 * self.seconds)
        if code is None:
            raise Stuck(f"the {name} run had no end after {2 * self.seconds:.0f} s, see {log.name}")
        if code != 0:
            raise Stuck(f"the {name} run ended with {code}, see {log.name}: {last_line(log)}")

    def _disturb(self, number: int, name: signal.Signals) -> dict[str, Any]:
        """Start or resume the run, send a signal to one rank some steps after a checkpoint, wait for the end."""
        log = self._log(f"disturbed-{number}-{name.name}")
        with self._start("disturbed", log) as process:
            step = self._wait_for_steps(process, log)
            ranks = children_of(process.pid, PROGRAM)
            if not ranks or not send(random.Random(number).choice(ranks), name):
                raise Stuck(f"the run ended before it got {name.name}, see {log.name}: {last_line(log)}")
            begin = time.monotonic()
            code = self._wait(process, self.seconds)
        return {"signal": name.name, "step": step, "code": code, "seconds": time.monotonic() - begin}

    def _wait(self, process: subprocess.Popen, seconds: float) -> int | None:
        """Exit code of a launch, None when it has not ended within `seconds`. Raises OutOfTime."""
        left = self.deadline - time.monotonic()
        try:
            return process.wait(max(0.0, min(seconds, left)))
        except subprocess.TimeoutExpired:
            if left <= seconds:
                raise OutOfTime from None
            return None

    def _wait_for_steps(self, process: subprocess.Popen, log: Path) -> int:
        """Wait for a step of this launch and a whole checkpoint; the step. Raises Stuck."""
        deadline = time.monotonic() + 2 * self.seconds
        while True:
            steps = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("step ")]
            saved = (self.folder / "disturbed" / "checkpoints" / "latest").exists()
            if steps and saved:
                return int(steps[-1].split()[1].split("/")[0])
            if process.poll() is not None:
                raise Stuck(f"the run ended with {process.returncode} undisturbed, see {log.name}: {last_line(log)}")
            if time.monotonic() > self.deadline:
                raise OutOfTime
            if time.monotonic() > deadline:
                raise Stuck(f"no checkpoint within {2 * self.seconds:.0f} s, see {log.name}")
            time.sleep(0.01)

    def _start(self, name: str, log: Path) -> Any:
        """The launch, see `logged_process`."""
        run = self.case.runs[0]
        overrides = (*run.overrides, f"run_root={self.folder}", f"name={name}", "training.keep_checkpoints=1")
        command = [*self.launcher, "-m", PROGRAM, "pretrain", *overrides]
        return logged_process(command, log, environment=self.environment, folder=self.logs)

    def _log(self, name: str) -> Path:
        return self.logs / f"kill-{name}.log"


def last_line(log: Path) -> str:
    """The last line of a log that reports an error, or else the last one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    text = [line for line in lines if line.startswith(("error:", "interrupted:"))]
    return (text or lines or ["no output"])[-1][:300]

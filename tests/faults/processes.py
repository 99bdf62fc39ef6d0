"""Runs of scripts/pretrain.py that tests disturb while they go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.free_ports import free_port
from tests.support.small_run import SMALL_MODEL
from tests.support.waiting import HANG_SECONDS

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = (
    "+experiment=demo_sep",
    *SMALL_MODEL,
    "training.validation_interval=0",
    "training.validation_samples=0",
    "training.checkpoint_interval=0",
    "logging.interval=1",
)


@dataclass
class Run:
    """Processes of one run under way; what each prints goes to a file."""

    processes: list[subprocess.Popen]
    logs: list[Path]
    folder: Path

    def text(self, number: int = 0) -> str:
        """What a process has printed so far."""
        return self.logs[number].read_text(errors="replace")

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for `condition`; fails with what was printed when it does not come or all processes end before."""
        deadline = time.monotonic() + HANG_SECONDS
        while not condition():
            ended = all(process.poll() is not None for process in self.processes)
            if (ended and not condition()) or time.monotonic() > deadline:
                printed = "\n".join(self.text(n)[-3000:] for n in range(len(self.logs)))
                raise AssertionError(f"{what} did not come:\n{printed}")
            time.sleep(0.02)

    def wait_for_text(self, words: str, number: int = 0) -> None:
        """Wait until a process prints `words`."""
        self.wait_until(lambda: words in self.text(number), words)

    def code(self, number: int = 0) -> int:
        """Exit code of a process, waited for."""
        return self.processes[number].wait(HANG_SECONDS)

    def status(self) -> str:
        """Of run.json."""
        return json.loads((self.folder / "run.json").read_text())["status"]

    def steps_saved(self) -> list[int]:
        """Steps of the whole checkpoints."""
        return sorted(int(path.name[5:]) for path in (self.folder / "checkpoints").glob("step_????????"))


@dataclass(frozen=True)
class Launcher:
    """Starts runs in `root`, with the sample corpus in `cache`."""

    root: Path
    cache: Path

    def arguments(self, name: str, *overrides: str) -> list[str]:
        """Command line of a run, from the script on."""
        script = str(REPOSITORY / "scripts" / "pretrain.py")
        return [script, *SMALL, f"run_root={self.root}", f"data.cache={self.cache}", f"name={name}", *overrides]

    @contextmanager
    def alone(self, name: str, *overrides: str) -> Iterator[Run]:
        """One process."""
        with self._started(name, [([sys.executable], {})], overrides) as run:
            yield run

    @contextmanager
    def torchrun(self, name: str, *overrides: str, processes: int = 2) -> Iterator[Run]:
        """torchrun, which starts the ranks."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        with self._started(name, [(launcher, {})], overrides) as run:
            yield run

    @contextmanager
    def ranks(self, name: str, *overrides: str, world_size: int = 2, started: int | None = None) -> Iterator[Run]:
        """The ranks themselves, without torchrun; only the first `started` of them."""
        common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        places = [
            common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            for rank in range(world_size if started is None else started)
        ]
        with self._started(name, [([sys.executable], place) for place in places], overrides) as run:
            yield run

    @contextmanager
    def _started(
        self, name: str, launches: list[tuple[list[str], dict[str, str]]], overrides: tuple[str, ...]
    ) -> Iterator[Run]:
        """Processes, none of which outlives the block."""
        run = Run([], [], self.root / name)
        try:
            for number, (launcher, environment) in enumerate(launches):
                log = self.root / f"{name}_{number}.log"
                with open(log, "wb") as output:
                    process = subprocess.Popen(
                        [*launcher, *self.arguments(name, *overrides)],
                        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
                        cwd=self.root,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                run.processes.append(process)
                run.logs.append(log)
            yield run
        finally:
            for process in run.processes:
                # The whole session: torchrun's workers and the data workers too.
                for pid in (*descendants(process.pid), process.pid):
                    kill(pid, signal.SIGKILL)
                process.wait()


def descendants(pid: int) -> list[int]:
    """Process ids of the children of a process, and of theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
        found += [other for child in children for other in (child, *descendants(child))]
    return found


def environment_of(pid: int) -> dict[str, str]:
    """Environment variables of a process, none when it is gone."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in raw.split("\0") if "=" in entry)


def kill(pid: int, number: signal.Signals) -> bool:
    """Send a signal; False when the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Lines of a JSON lines file of a run."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]

"""A rank that hangs, never comes or is gone: the others end in time, with a sentence that names it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sepllm_train.base.errors import EXIT_LOST_RANK
from sepllm_train.training import watchdog as watchdog_module
from tests.faults.processes import REPOSITORY, Launcher, descendants, environment_of, kill
from tests.support.waiting import HANG_SECONDS, wait_until

LONG = "training.steps=100000"


@pytest.mark.distributed
@pytest.mark.slow
def test_stopped_rank_is_named(launcher: Launcher) -> None:
    with launcher.ranks("stopped", LONG, "training.hang_seconds=10") as run:
        run.wait_for_text("step 3/")
        kill(run.processes[1].pid, signal.SIGSTOP)
        assert run.code() == EXIT_LOST_RANK
        sentence = run.text().strip().splitlines()[-1]
        assert sentence.startswith("error: no progress for")
        assert "rank 1 gave no sign of life, and rank 0 waited in step " in sentence
        stacks = (run.folder / "stacks_rank0.txt").read_text()
        # Where the main thread waits for the other rank.
        for printed in (stacks, run.text()):
            assert "Current thread" in printed and "/training/step.py" in printed and "distributed_c10d.py" in printed
        assert run.status() == "running"


@pytest.mark.distributed
def test_rank_that_is_killed_ends_the_other(launcher: Launcher) -> None:
    """Without torchrun, which would end the other rank itself."""
    with launcher.ranks("killed", LONG) as run:
        run.wait_for_text("step 3/")
        kill(run.processes[1].pid, signal.SIGKILL)
        assert run.code() == EXIT_LOST_RANK
        assert "error: another process of the run has ended or cannot be reached" in run.text()
        assert "Traceback" not in run.text()


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="the signal at the parent's death is Linux's")
def test_ranks_end_when_torchrun_is_killed(launcher: Launcher) -> None:
    """They lose the store with it, so they cannot save: they say so, end, and leave the run folder."""
    with launcher.torchrun("orphans", LONG) as run:
        run.wait_for_text("step 3/")
        torchrun = run.processes[0]
        ranks = [pid for pid in descendants(torchrun.pid) if "RANK" in environment_of(pid)]
        assert len(ranks) == 2
        try:
            kill(torchrun.pid, signal.SIGKILL)
            torchrun.wait()
            wait_until(lambda: not any(alive(pid) for pid in ranks), "the ranks end")
        finally:
            for pid in ranks:
                kill(pid, signal.SIGKILL)
        assert "SIGTERM received" in run.text()
        assert "error: the processes could not agree on checkpoint" in run.text()
        assert "Traceback" not in run.text()


def alive(pid: int) -> bool:
    """Whether a process runs: one that has ended may be a zombie until its new parent asks for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_rank_that_never_comes(launcher: Launcher) -> None:
    with launcher.ranks("waiting", LONG, "parallel.timeout_seconds=2", started=1) as run:
        assert run.code() == EXIT_LOST_RANK
        assert "error: not all of the 2 processes came together within parallel.timeout_seconds=2" in run.text()
        assert "Traceback" not in run.text() and not run.folder.exists()


WATCHED = """
import importlib.util, sys, time
from pathlib import Path

# The module alone: its package imports megatron-core, which takes seconds.
spec = importlib.util.spec_from_file_location("watchdog", "sepllm_train/training/watchdog.py")
module = sys.modules["watchdog"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
Watchdog = module.Watchdog

folder, rank, beats, hangs, patience = Path(sys.argv[1]), *map(int, sys.argv[2:])
# Long enough for a rank that a busy machine has delayed; ranks that have written their places are not waited for.
module._GRACE_SECONDS = (patience, patience)
with Watchdog(folder, 1.0, rank, 2) as watchdog:
    # DISTURBANCE
    for number in range(beats):
        watchdog.beat(f"step {number}")
    while hangs:
        time.sleep(1)
"""


def watched(
    folder: Path, *ranks: tuple[int, bool], disturbance: str = "pass", patience: int = 60
) -> list[tuple[int, str]]:
    """(exit code, output) of processes that run `disturbance`, beat so often, then hang or end.

    Those that hang wait `patience` seconds for the file system and for one another.
    """
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                WATCHED.replace("# DISTURBANCE", disturbance),
                str(folder),
                str(rank),
                str(beats),
                str(int(hangs)),
                str(patience),
            ],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, (beats, hangs) in enumerate(ranks)
    ]
    outputs = [process.communicate(timeout=HANG_SECONDS)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def test_rank_furthest_behind_is_named(tmp_path: Path) -> None:
    """Both hang and can say where: the one with less progress holds up the other."""
    (ahead, said), (behind, _) = watched(tmp_path, (8, True), (4, True))
    assert ahead == behind == EXIT_LOST_RANK
    assert "rank 1 hung in step 3, behind the others" in said
    assert "rank 0 hangs in step 7" in said and "time.sleep" not in said and 'File "<string>"' in said


@pytest.mark.parametrize(
    ("disturbance", "why"),
    [
        # Opening a pipe that nobody reads blocks, as opening a file on a dead network file system does.
        ("import os; os.mkfifo(watchdog.stacks_file(rank))", "it did not answer for 2 seconds"),
        ("watchdog.stacks_file(rank).symlink_to('/dev/full')", os.strerror(28)),
    ],
)
def test_hang_ends_though_no_file_can_be_written(tmp_path: Path, disturbance: str, why: str) -> None:
    ((code, said),) = watched(tmp_path, (3, True), disturbance=disturbance, patience=2)
    assert code == EXIT_LOST_RANK
    assert "rank 0 hung in step 2, and " in said and f"could not be written ({why})" in said
    assert 'File "<string>"' in said and "Traceback" not in said


def test_run_that_ends_is_no_hang(tmp_path: Path) -> None:
    assert [code for code, _ in watched(tmp_path, (30, False), (1, False))] == [0, 0]
    assert not list(tmp_path.glob("stacks_*"))


class SimulatedWatch:
    """The watchdog's clock and what it waits on: a second passes in each wait, and `progress` hears of it."""

    def __init__(self, progress: Callable[[int], None], last: int) -> None:
        self.now, self.progress, self.last = 0, progress, last

    def monotonic(self) -> float:
        """The time."""
        return self.now

    def wait(self, seconds: float) -> bool:
        """Whether the run is over."""
        assert seconds == 1.0
        self.now += 1
        self.progress(self.now)
        return self.now == self.last


@pytest.mark.parametrize(
    ("interval", "allowed", "hangs"),
    [(10, None, []), (12, None, [11, 23]), (12, 6, [23]), (30, 6, [*range(19, 30)])],
)
def test_limit_is_on_the_time_between_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: int, allowed: int | None, hangs: list[int]
) -> None:
    """A limit of 10 seconds in a run of 30, with a beat every `interval` and 2 seconds more at the time `allowed`.

    `hangs` are the times that are too late.
    """
    watchdog = watchdog_module.Watchdog(tmp_path, 10.0, 0, 1)

    def progress(now: int) -> None:
        if now % interval == 0:
            watchdog.beat("a step")
        if now == allowed:
            watchdog.allow(2.0)

    simulated = SimulatedWatch(progress, 30)
    found: list[int] = []
    monkeypatch.setattr(watchdog_module, "time", simulated)
    monkeypatch.setattr(watchdog, "_stop", simulated)
    monkeypatch.setattr(watchdog, "_end", lambda: found.append(simulated.now))
    watchdog.last = 0.0
    watchdog._watch()
    assert found == hangs

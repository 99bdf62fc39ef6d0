"""Signals before there is a step to save: exit code 75 from the moment on that the program runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sepllm_train.base.errors import EXIT_INTERRUPTED
from tests.faults.processes import Launcher, kill
from tests.support.small_run import SMALL_RUN
from tests.support.waiting import HANG_SECONDS, wait_until

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ENDLESS = ("training.steps=1000000", "training.checkpoint_interval=0")


def catches(pid: int) -> bool:
    """True when a process handles SIGTERM."""
    try:
        line = next(one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("SigCgt"))
    except OSError:
        return False
    return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def has_torch(pid: int) -> bool:
    """True when a process has torch's library in memory."""
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def at_the_start(process: subprocess.Popen[str]) -> None:
    wait_until(lambda: catches(process.pid), "a handler", process)
    assert not has_torch(process.pid), "the handlers stand before anything is imported"


def in_the_imports(process: subprocess.Popen[str]) -> None:
    wait_until(lambda: has_torch(process.pid), "torch", process)


def before_the_model(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("model: "):
            return
    raise AssertionError("no model was described")


def started(root: Path, cache: Path, *words: str) -> subprocess.Popen[str]:
    folders = [f"run_root={root}", f"data.cache={cache}", "name=early"]
    command = [sys.executable, "-m", "sepllm_train", "pretrain", *words, *SMALL_RUN, *ENDLESS, *folders]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("moment", [at_the_start, in_the_imports, before_the_model])
@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_a_signal_before_the_first_step(
    tmp_path: Path, sample_cache: Path, moment: Callable[[subprocess.Popen[str]], None], number: signal.Signals
) -> None:
    with started(tmp_path, sample_cache) as process:
        moment(process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == EXIT_INTERRUPTED, errors
    assert errors.splitlines()[-1].startswith("interrupted: ") and "Traceback" not in errors
    assert number.name in errors


@pytest.mark.distributed
@pytest.mark.parametrize("moment", ["launcher", "ranks"])
def test_a_signal_to_a_launcher_that_is_starting(tmp_path: Path, sample_cache: Path, moment: str) -> None:
    def ranks() -> list[psutil.Process]:
        return [child for child in psutil.Process(process.pid).children() if "RANK" in child.environ()]

    with started(tmp_path, sample_cache, "--nproc", "2") as process:
        if moment == "launcher":
            at_the_start(process)
        else:
            wait_until(lambda: len(ranks()) == 2, "ranks", process)
        process.send_signal(signal.SIGHUP)
        _, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == EXIT_INTERRUPTED, errors
    assert errors.splitlines()[-1].startswith("interrupted: ") and "Traceback" not in errors


def test_what_was_started_to_ignore_hangups_trains_on(launcher: Launcher) -> None:
    """nohup, and what a script puts in the background."""
    ignored = (signal.SIGHUP, signal.SIGINT)
    before = [signal.signal(number, signal.SIG_IGN) for number in ignored]
    try:
        with launcher.alone("nohup", "training.steps=1000000") as run:
            run.wait_for_text("step 3/")
            for number in ignored:
                kill(run.processes[0].pid, number)
            steps = run.text().count("step ")
            run.wait_until(lambda: run.text().count("step ") > steps + 3, "more steps")
            assert "received" not in run.text()
            kill(run.processes[0].pid, signal.SIGTERM)
            assert run.code() == EXIT_INTERRUPTED
    finally:
        for number, handler in zip(ignored, before, strict=True):
            signal.signal(number, handler)

"""Signals end a run in good order: the step is finished and saved, all ranks agree on it, the exit code says so."""

from __future__ import annotations

import re
import signal
import time

import pytest

from sepllm_train.base.errors import EXIT_INTERRUPTED
from tests.faults.processes import Launcher, Run, kill, records

LONG = "training.steps=100000"


def saved_where_it_says(run: Run) -> int:
    """The step of the sentence, which must be the only checkpoint."""
    said = re.search(r"interrupted: .* after step (\d+) of 100000, which is saved", run.text())
    assert said, run.text()[-2000:]
    step = int(said[1])
    assert run.steps_saved() == [step] and run.status() == "interrupted"
    assert f"step {step}/100000" in run.text() and f"step {step + 1}/100000" not in run.text()
    # torchrun prints one of its own, after ours.
    assert "Traceback" not in run.text().split("interrupted: ")[0]
    return step


@pytest.mark.distributed
def test_a_signal_to_one_rank_stops_all_at_the_same_step(launcher: Launcher) -> None:
    with launcher.ranks("usr1", LONG, "data.workers=1") as run:
        run.wait_for_text("step 3/")
        kill(run.processes[1].pid, signal.SIGUSR1)
        assert [run.code(0), run.code(1)] == [EXIT_INTERRUPTED] * 2
        assert "a signal to another process stopped the run" in run.text()
        saved_where_it_says(run)


def validated(run: Run) -> list[int]:
    """Steps of the validations in metrics.jsonl."""
    return [record["step"] for record in records(run.folder) if "val/loss" in record]


@pytest.mark.parametrize(
    "first",
    [signal.SIGTERM, *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGINT, signal.SIGHUP))],
)
def test_a_second_signal_does_not_break_the_save(launcher: Launcher, first: signal.Signals) -> None:
    """Signals rain until the process is gone; the checkpoint is whole and the run continues from it.

    The validation that was due at the last step waits for the run that continues.
    """
    name = f"twice_{first.name}"
    often = ("training.validation_interval=1", "training.validation_samples=2")
    with launcher.alone(name, LONG, *often) as run:
        run.wait_for_text("step 3/")
        process = run.processes[0]
        kill(process.pid, first)
        run.wait_for_text(f"{first.name} received")
        while process.poll() is None:
            kill(process.pid, signal.SIGTERM)
            kill(process.pid, signal.SIGINT)
            time.sleep(0.01)
        assert process.returncode == EXIT_INTERRUPTED
        assert run.text().count(" received: ") == 1
        step = saved_where_it_says(run)
        assert validated(run) == list(range(step))
    if first is signal.SIGTERM:
        with launcher.alone(name, LONG, *often) as run:
            run.wait_for_text(f"validation at step {step + 2}:")
            kill(run.processes[0].pid, signal.SIGKILL)
            run.processes[0].wait()
            assert validated(run)[: step + 3] == list(range(step + 3))
            assert f"resumed from {run.folder}/checkpoints/step_{step:08d}" in run.text()
            assert f"step {step}/" not in run.text()


@pytest.mark.distributed
def test_torchrun_passes_sigterm_on(launcher: Launcher) -> None:
    with launcher.torchrun("torchrun", LONG) as run:
        run.wait_for_text("step 3/")
        kill(run.processes[0].pid, signal.SIGTERM)
        assert run.code() != 0
        assert "SIGTERM received" in run.text()
        saved_where_it_says(run)

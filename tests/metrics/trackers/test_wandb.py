"""Weights & Biases, offline: what it recorded is what metrics.jsonl has, and whatever befalls it the run goes on."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import psutil
import pytest

from sepllm_train.metrics.wandb_tracker import AXES
from tests.faults.processes import Launcher, kill, records
from tests.metrics.trackers.conftest import Tracked
from tests.metrics.trackers.wandb_file import Recorded, read
from tests.support.waiting import HANG_SECONDS

OWN = ("_step", "_runtime", "_timestamp")


def history(recorded: Recorded) -> list[dict[str, float]]:
    """Rows of the history without W&B's own keys."""
    return [{key: value for key, value in row.items() if key not in OWN} for row in recorded.history]


@pytest.mark.distributed
def test_history_is_metrics_jsonl(tracked: Tracked) -> None:
    recorded = read(tracked.root / "wandb")
    assert history(recorded) == tracked.rows("wandb")
    assert [row["_step"] for row in recorded.history] == [0, 1, 2, 3, 4]
    assert recorded.exit_code == 0 and not recorded.preempting
    assert (recorded.project, recorded.group, recorded.tags) == ("tested", "some", ["a", "b"])


@pytest.mark.distributed
def test_axes(tracked: Tracked) -> None:
    axes = read(tracked.root / "wandb").axes
    assert set(AXES) == {"flops/model", "flops/dense", "flops/paper", "tokens", "seconds", "step"} <= axes.keys()
    assert axes["train/loss"] == axes["val/*"] == "flops/model" and axes["train/*"] == "step"
    assert all(row.keys() >= set(AXES) for row in tracked.rows("wandb"))


@pytest.mark.distributed
def test_config_tells_what_was_run(tracked: Tracked) -> None:
    config = read(tracked.root / "wandb").config
    assert config["attention"]["full_layers"] == "first" and config["parallel"]["context"] == 2
    run = json.loads((tracked.root / "wandb" / "run.json").read_text())
    assert config["run"]["comparable"] == run["comparable"] and config["derived"]["parameters"] == run["parameters"]
    assert config["derived"]["backends"] == run["backends"] and 0 < config["derived"]["attended_share"] < 1
    environment = json.loads((tracked.root / "wandb" / "environment.json").read_text())
    assert config["environment"]["git"] == environment["git"]
    docs = config["datasets"]["docs"]
    density = docs["separator_density"]
    assert 0 < density["comma"] < density["period"] < 0.1
    assert docs["separator_count"]["comma"] == round(density["comma"] * docs["tokens"])
    assert docs["tokenizer"]["sha256"] == run["comparable"]["tokenizer"] and "token_bytes" not in docs


@pytest.mark.distributed
def test_nothing_but_the_records_is_taken(tracked: Tracked) -> None:
    """No console, code, packages or machine load; no file outside the run's folder; no process after the run."""
    recorded = read(tracked.root / "wandb")
    assert recorded.kinds <= {"header", "run", "metric", "history", "summary", "telemetry", "exit"}
    assert not list(tracked.home.rglob("*"))
    assert [name for name, told in tracked.told.items() if told["left"]] == []


@pytest.mark.distributed
def test_the_end_says_how_to_upload(tracked: Tracked) -> None:
    (command,) = re.findall(r"upload it with: (wandb sync .*)", tracked.said("wandb"))
    folder = Path(shlex.split(command)[2])
    assert folder.is_absolute() and list(folder.glob("*.wandb")) and tracked.root / "wandb" in folder.parents
    # Once at the interruption, once at the end.
    commands = re.findall(r"upload it with: wandb sync (.*)", tracked.said("wandb_resumed"))
    assert len(set(commands)) == 2 and not Path(commands[0]).exists() and Path(commands[1]).exists()


@pytest.mark.distributed
def test_resumed_run_keeps_its_id_and_repeats_nothing(tracked: Tracked) -> None:
    """Interrupted after step 3, resumed from step 2: the newest folder has every step once, as metrics.jsonl has it."""
    folder = tracked.root / "wandb_resumed"
    recorded = read(folder)
    assert recorded.run_id == json.loads((folder / "wandb.json").read_text())["id"]
    assert len(set(re.findall(r"W&B: run (\w+), offline", tracked.said("wandb_resumed")))) == 1
    assert "resumed from" in tracked.said("wandb_resumed")
    assert history(recorded) == tracked.rows("wandb_resumed") and len(recorded.history) == 5


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wandb_no_folder", r"File exists: .*wandb_no_folder/wandb"),
        ("wandb_killed", "Connection"),
        ("wandb_stopped", "it did not end within 2 seconds"),
        ("tensorboard_no_folder", r"File exists: .*/tensorboard"),
    ],
)
def test_failure_costs_one_warning(tracked: Tracked, name: str, words: str) -> None:
    (warning,) = [line for line in tracked.said(name).splitlines() if line.startswith("warning: ")]
    assert re.search(rf"(W&B|TensorBoard) is off \(.*{words}.*\): training goes on", warning)
    assert [row["step"] for row in tracked.rows(name)] == [0, 1, 2, 3, 4]
    assert json.loads((tracked.root / name / "run.json").read_text())["status"] == "finished"


@pytest.mark.distributed
def test_trackers_change_no_bit(tracked: Tracked) -> None:
    """Also of the runs that were disturbed and resumed."""
    assert len({told["state"] for told in tracked.told.values()}) == 1
    losses = [[row.get("train/loss") for row in tracked.rows(name)] for name in tracked.told]
    assert all(other == losses[0] for other in losses)


@pytest.mark.slow
def test_kill_and_sigterm_of_a_real_run(launcher: Launcher) -> None:
    """kill -9 takes W&B's process along; the same command goes on; SIGTERM ends it with 75 and nothing left."""
    options = ("logging=wandb", "training.steps=100000", "training.checkpoint_interval=5", "data.workers=1")
    with launcher.alone("disturbed", *options) as run:
        run.wait_until(lambda: bool(run.steps_saved()), "a checkpoint")
        (core,) = cores_of(run.processes[0].pid)
        kill(run.processes[0].pid, 9)
        gone, _ = psutil.wait_procs([core], timeout=HANG_SECONDS)
        assert gone
    with launcher.alone("disturbed", *options) as run:
        run.wait_for_text("resumed from")
        before = len(records(run.folder))
        run.wait_until(lambda: len(records(run.folder)) > before + 5, "more steps")
        cores = cores_of(run.processes[0].pid)
        kill(run.processes[0].pid, 15)
        assert run.code() == 75, run.text()[-2000:]
        _, left = psutil.wait_procs(cores, timeout=HANG_SECONDS)
        assert not left and "Traceback" not in run.text()
        assert len(re.findall("upload it with: wandb sync", run.text())) == 1
    recorded = read(run.folder)
    assert recorded.preempting and recorded.exit_code == 75
    steps = [row["_step"] for row in recorded.history]
    assert steps == [record["step"] for record in records(run.folder) if "train/loss" in record]
    assert steps == list(range(1, len(steps) + 1))


def cores_of(pid: int) -> list[psutil.Process]:
    """W&B's processes of a run."""
    return [child for child in psutil.Process(pid).children(recursive=True) if child.name() == "wandb-core"]

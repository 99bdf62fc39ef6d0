"""Tracked runs on two ranks that share each sequence, some disturbed; run through distributed_runner."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from pytest import MonkeyPatch

from sepllm_train.config.schema import Config, LoggingConfig
from sepllm_train.config.validate import validate
from sepllm_train.distributed.launch import Launch, device_of, launch_from_environment, model_parallel, reading_group
from sepllm_train.metrics import trackers
from sepllm_train.training.checkpoint import digest
from sepllm_train.training.run import train
from tests.support.waiting import HANG_SECONDS
from tests.training.resume_worker import small_run

STEPS = 4


def train_tracked(root: str, cache: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Train `runs` one after another. Each: {name, logging: LoggingConfig's keys, prepare and disturb: names below,
    forget: a step}; with `forget` the run is disturbed, loses the checkpoint of that step, and is started again.

    Gives of each, by name: what it said, the digest of its last checkpoint, W&B's processes that it left.
    """
    launch = launch_from_environment()
    told: dict[str, Any] = {}
    with reading_group(launch):
        for run in runs:
            folder = Path(root) / run["name"]
            config = config_of(root, cache, run)
            if "prepare" in run and launch.main:
                PREPARE[run["prepare"]](folder)
            dist.barrier()
            with contextlib.redirect_stdout(io.StringIO()) as output:
                with disturbing(run.get("disturb")):
                    train_once(config, launch)
                if "forget" in run:
                    if launch.main:
                        shutil.rmtree(folder / "checkpoints" / f"step_{run['forget']:08d}")
                    dist.barrier()
                    train_once(config, launch)
            told[run["name"]] = {"said": output.getvalue(), "state": digest(folder), "left": len(cores())}
        dist.barrier()
    return told


def config_of(root: str, cache: str, run: dict[str, Any]) -> Config:
    """Four steps with everything that gives a record keys of its own."""
    config = small_run(
        root,
        cache,
        run["name"],
        model={"layers": 3},
        attention={"full_layers": "first"},
        parallel={"context": 2},
        training={"steps": STEPS, "validation_interval": 2, "validation_samples": 2, "keep_checkpoints": STEPS},
    )
    config.logging = LoggingConfig(interval=1, peak_tflops=1.0, **run["logging"])
    return config


def train_once(config: Config, launch: Launch) -> None:
    """One life of a run."""
    validate(config, launch.world_size)
    device = device_of(launch)
    with model_parallel(config, device):
        train(config, launch, device)


def cores() -> list[psutil.Process]:
    """W&B's processes that this one has started."""
    return [child for child in psutil.Process().children() if child.name() == "wandb-core"]


@contextmanager
def disturbing(disturbance: str | None) -> Iterator[None]:
    """Do what DISTURB has by that name when rank 0 mirrors the first record of step 2.

    A tracker that is stopped is not waited for long, any other as long as a busy machine may need.
    """
    log = trackers.Mirror.log
    done = disturbance is None

    def disturbed(self: trackers.Mirror, record: dict[str, Any]) -> None:
        nonlocal done
        if not done and disturbance is not None and record["step"] >= 2:
            done = True
            DISTURB[disturbance]()
        log(self, record)

    with MonkeyPatch.context() as patch:
        patch.setattr(trackers.Mirror, "log", disturbed)
        patch.setattr(trackers, "END_SECONDS", 2.0 if disturbance == "stop" else HANG_SECONDS)
        patch.setattr(trackers, "INTERRUPTED_SECONDS", HANG_SECONDS)
        yield


PREPARE: dict[str, Callable[[Path], Any]] = {
    "file_in_place_of_folder": lambda folder: (
        folder.mkdir(),
        *((folder / n).touch() for n in ("wandb", "tensorboard")),
    ),
}
DISTURB: dict[str, Callable[[], Any]] = {
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "kill": lambda: [core.kill() for core in cores()],
    "stop": lambda: [core.suspend() for core in cores()],
}

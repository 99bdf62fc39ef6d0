"""What a run tells about its time and memory: parts of a step, stragglers, profiles, running out of memory."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sepllm_train.config.schema import Config, DataConfig, TrainingConfig
from sepllm_train.data.splits import SourceSplit
from sepllm_train.training import clock, loop, run_folder, step_logger
from sepllm_train.training.clock import PARTS, StepClock
from sepllm_train.training.console_lines import data_warnings
from sepllm_train.training.facts import SourceFacts
from tests.support.distributed_runner import run_ranks
from tests.support.waiting import HANG_SECONDS


def test_profiled_steps_and_no_others(trainer: Any, finished: Callable) -> None:
    plain = finished("plain", "training.validation_interval=0")
    name = finished("profiled", "training.validation_interval=0", "logging.profile=[2,3]")
    folder = trainer.root / name / "profile"
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["steps_00000002-00000003_rank0.json.gz", "steps_00000002-00000003_rank0.txt"]
    events = json.loads(gzip.decompress((folder / files[0]).read_bytes()))["traceEvents"]
    # Adam's update is one event of each step.
    assert sum(event.get("name") == "Optimizer.step#AdamW.step" for event in events) == 2
    assert "aten::mm" in (folder / files[1]).read_text()
    assert not (trainer.root / plain / "profile").exists()
    assert trainer.values(name, "train/loss") == trainer.values(plain, "train/loss")


def test_files_that_git_does_not_know_are_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source.py"
    source.touch()
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    for command in (("init",), ("add", "."), (*identity, "commit", "-m", "first")):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True, capture_output=True)
    monkeypatch.setattr(run_folder, "__file__", str(source))
    (tmp_path / "notes.txt").touch()
    state = run_folder.git_state()
    assert state is not None and not state["changed"]
    source.write_text("changed")
    state = run_folder.git_state()
    assert state is not None and state["changed"]


def test_what_of_the_data_is_probably_not_meant_so() -> None:
    splits = {"few": SourceSplit(600, 400, 10), "many": SourceSplit(970, 30, 10)}
    few, many = (
        SourceFacts(SimpleNamespace(prefix=name), split, 0.5, 100.0, None)  # type: ignore[arg-type]
        for name, split in splits.items()
    )
    training = TrainingConfig(steps=10, global_batch=200)
    own = DataConfig(source="prefixes", prefixes=["few", "many"])
    (warning,) = data_warnings(Config(data=own, training=training), [few, many], 100.0)
    assert "40.0% of the tokens of few are held out, not data.validation_fraction=0.02" in warning
    assert not data_warnings(Config(training=replace(training, steps=5)), [many], 100.0)
    (warning,) = data_warnings(Config(training=training), [many], 200.0)
    assert warning.startswith("warning: the run passes 200 times over the small sample corpus: data=prefixes ")


def test_parts_of_a_step_add_up(trainer: Any, finished: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the training thread's own processor time, which is the same on a busy machine."""
    for module in (clock, loop, step_logger):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=time.thread_time))
    for record in trainer.records(finished("timed", "training.validation_interval=0")):
        if "train/loss" not in record:
            continue
        parts = [record[f"train/{part}_seconds"] for part in PARTS]
        assert all(seconds > 0 for seconds in parts)
        assert 0.5 * record["train/step_seconds"] < sum(parts) <= record["train/step_seconds"]
        assert "train/straggler_ratio" not in record


class SimulatedTime:
    """Replaces the module `time` of the step clock: seconds pass in `sleep`, and `look` seconds in each reading."""

    def __init__(self, look: float = 0.0) -> None:
        self.now, self.look = 0.0, look

    def perf_counter(self) -> float:
        """The time, and a reading more."""
        self.now += self.look
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def test_a_part_within_another_is_taken_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = SimulatedTime()
    monkeypatch.setattr(clock, "time", simulated)
    steps = StepClock(torch.device("cpu"))
    steps.begin()
    forward = steps("forward-compute", log_level=2)
    forward.start()
    simulated.sleep(0.25)
    with steps.part("data_wait"):
        simulated.sleep(2.0)
    simulated.sleep(0.5)
    forward.stop()
    with steps.part("optimizer"):
        simulated.sleep(4.0)
    steps.end()
    with steps.part("optimizer"):  # outside of a step
        simulated.sleep(8.0)
    expected = {"forward": 0.75, "data_wait": 2.0, "optimizer": 4.0}
    assert steps.take() == {part: expected.get(part, 0.0) for part in PARTS}
    assert steps.take() == dict.fromkeys(PARTS, 0.0)


def parts_with_slow_data(slow_rank: int) -> dict[str, float]:
    """Metrics of two real steps, in simulated time, in which the data of one rank comes a second late."""
    from sepllm_train.distributed.launch import launch_from_environment, process_grid
    from sepllm_train.model.pattern import resolve_pattern
    from sepllm_train.training import clock
    from sepllm_train.training.setup import build_training
    from sepllm_train.training.step import Stepper
    from tests.metrics.peak_bytes import PYTHIA14M, configuration, random_batches

    config = configuration(PYTHIA14M, {"precision": "fp32", "global_batch": 4})
    launch = launch_from_environment()
    clock.time = simulated = SimulatedTime(look=0.01)  # type: ignore[assignment]

    def late() -> Iterator[Any]:
        for batch in random_batches(config, 256, 1):
            simulated.sleep(1.0 if launch.rank == slow_rank else 0.0)
            yield batch

    with process_grid(config, launch) as device:
        training = build_training(config, 256, device)
        stepper = Stepper(config, resolve_pattern(config.attention, config.model.layers), training, device)
        for _ in range(2):
            stepper.clock.begin()
            stepper.train([late()], 1, lambda number: None)
            stepper.clock.end()
        return clock.step_parts(stepper.clock.take(), 2, device)


@pytest.mark.distributed
def test_the_slowest_rank_is_named() -> None:
    ranks = run_ranks(parts_with_slow_data, 2, slow_rank=1)
    assert ranks[0] == ranks[1]
    assert ranks[0]["train/straggler_rank"] == 1
    assert 1.1 < ranks[0]["train/straggler_ratio"] < 2.0
    assert 1.0 <= ranks[0]["train/data_wait_seconds"] < 1.1


LIMITED = """
import resource, sys
import psutil
from sepllm_train.training import run
room = int(sys.argv.pop(1))
limit = psutil.Process().memory_info().vms + room
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from sepllm_train.cli.main import main
sys.exit(main(["pretrain", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="address-space limits are enforced on Linux")
def test_out_of_memory_names_what_to_change(trainer: Any, tmp_path: Path) -> None:
    """A run in an address space too small for it; then with the first change that it was told."""
    overrides = [
        "+experiment=demo_sep",
        "model.layers=2",
        "model.hidden=32",
        "model.heads=2",
        "model.ffn=64",
        "data.sequence_length=4096",
        "data.workers=0",
        "training.steps=1",
        "training.global_batch=16",
        "training.micro_batch=16",
        "training.validation_samples=0",
        f"run_root={tmp_path}",
        f"data.cache={trainer.cache}",
    ]

    def run(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", LIMITED, str(3 << 29), *overrides, *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": "", "WORLD_SIZE": ""}
        # The C library reserves address space for each thread that allocates; the limit counts it.
        environment["MALLOC_ARENA_MAX"] = "1"
        environment = {key: value for key, value in environment.items() if value}
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            env=environment,
            cwd=trainer.repository,
            check=False,
        )

    failed = run("name=large")
    sentence = failed.stderr.strip().splitlines()[-1]
    assert failed.returncode == 2, failed.stderr[-2000:]
    told = re.match(r"error: out of memory: .* need ([\d.]+) GiB on each .* and ([\d.]+) GiB were free", sentence)
    assert told is not None and 0 < float(told[2]) < float(told[1])
    for key in ("training.micro_batch=", "parallel.tensor=2 on 2 processes"):
        assert key in sentence
    fitting = re.search(r"training\.micro_batch=\d+", sentence)[0]  # type: ignore[index]
    done = run("name=small", fitting)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("logging.profile=[3,2]", "logging.profile=[3, 2] must be"),
        ("logging.profile=[2,9]", "ends after the last step"),
        ("logging.profile=[1,2] logging.profile_ranks=[1]", "numbered from 0 to 0"),
    ],
)
def test_profile_mistakes(override: str, told: str) -> None:
    from sepllm_train.base.errors import UserError
    from sepllm_train.config.schema import Config, LoggingConfig, TrainingConfig
    from sepllm_train.config.validate import validate

    values = {key.split(".")[1]: json.loads(value) for key, value in (part.split("=") for part in override.split())}
    with pytest.raises(UserError, match=re.escape(told)):
        validate(Config(logging=LoggingConfig(**values), training=TrainingConfig(steps=4, global_batch=8)), 1)

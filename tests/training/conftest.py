"""Runs of scripts/pretrain.py on the sample corpus, small enough for tests."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sepllm_train.cli.main import main
from sepllm_train.config.schema import Config
from sepllm_train.distributed.launch import Launch, process_grid
from sepllm_train.training.setup import Training, build_training
from tests.support.distributed_runner import run_ranks
from tests.support.small_run import SMALL_RUN
from tests.support.waiting import HANG_SECONDS
from tests.training.checkpoints import VOCABULARY, config_of, update
from tests.training.resume_worker import train_all


@dataclass(frozen=True)
class Outcome:
    """A finished process of a test."""

    code: int
    output: str
    errors: str

    @property
    def unfolded(self) -> str:
        """The output with the lines that were folded to the width of the console whole again."""
        return re.sub(r"\n +", " ", self.output)

    @property
    def sentence(self) -> str:
        """The last thing the program itself printed."""
        return self.errors.strip().splitlines()[-1] if self.errors.strip() else ""


@dataclass(frozen=True)
class Trainer:
    """Starts scripts/pretrain.py with the small configuration, its runs in `root`."""

    repository: Path
    root: Path
    cache: Path

    def __call__(self, *overrides: str, processes: int = 1, small: bool = True) -> Outcome:
        """Run to the end; several processes go through torchrun."""
        script = str(self.repository / "scripts" / "pretrain.py")
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*launcher, script, *(SMALL_RUN if small else ()), *self._folders, *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=HANG_SECONDS, env=environment, cwd=self.root, check=False
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def here(self, *overrides: str) -> Outcome:
        """As a call with one process, in this process: one that is started imports for longer than it works."""
        threads = torch.get_num_threads()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(io.StringIO()) as output,
            contextlib.redirect_stderr(io.StringIO()) as errors,
        ):
            patch.chdir(self.root)
            torch.set_num_threads(1)
            try:
                code = main(["pretrain", *SMALL_RUN, *self._folders, *overrides])
            finally:
                torch.set_num_threads(threads)
        return Outcome(code, output.getvalue(), errors.getvalue())

    @property
    def _folders(self) -> list[str]:
        """Overrides that keep the run in `root` and its data in `cache`."""
        return [f"run_root={self.root}", f"data.cache={self.cache}"]

    def records(self, name: str) -> list[dict[str, Any]]:
        """metrics.jsonl of a run."""
        return [json.loads(line) for line in (self.root / name / "metrics.jsonl").read_text().splitlines()]

    def values(self, name: str, key: str) -> list[float]:
        """A metric over the run."""
        return [record[key] for record in self.records(name) if key in record]


@pytest.fixture(scope="session")
def trainer(repository: Path, sample_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The trainer of the session: runs of one test can be read by another."""
    return Trainer(repository, tmp_path_factory.mktemp("runs"), sample_cache)


@pytest.fixture(scope="session")
def finished(trainer: Trainer) -> Callable[..., str]:
    """Trains a run once and gives its name; with `processes=0` in this process."""
    done: set[str] = set()

    def train(name: str, *overrides: str, processes: int = 0) -> str:
        if name not in done:
            settings = (f"name={name}", *overrides)
            outcome = trainer(*settings, processes=processes) if processes else trainer.here(*settings)
            assert outcome.code == 0, outcome.errors[-3000:]
            done.add(name)
        return name

    return train


@pytest.fixture
def check_layouts(sample_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Trains a run in two processes in several layouts; losses, gradient norms and counts are those of one process.

    alone: what `train_all` gave there. settings: the run's for `small_run`. layouts: settings of `parallel`.
    """

    def check(alone: dict[str, Any], settings: dict[str, Any], layouts: list[dict[str, Any]]) -> None:
        runs = [{"name": f"layout {number}", "parallel": one, **settings} for number, one in enumerate(layouts)]
        root = str(tmp_path_factory.mktemp("layouts"))
        found = run_ranks(train_all, 2, root=root, cache=str(sample_cache), runs=runs)[0]
        for run in runs:
            result = found[run["name"]]
            assert result["losses"] == pytest.approx(alone["losses"], abs=1e-5), run["parallel"]
            assert result["norms"] == pytest.approx(alone["norms"], rel=1e-4), run["parallel"]
            for counter in ("state.pairs", "state.finished_pairs", "state.tokens"):
                assert result["state"][counter] == alone["state"][counter], run["parallel"]

    return check


@pytest.fixture(scope="module")
def grid() -> Iterator[torch.device]:
    """A single process as the whole grid, for the length of this module."""
    with process_grid(Config(), Launch(rank=0, world_size=1, local_rank=0, by_torchrun=False)) as device:
        yield device


@pytest.fixture
def training(grid: torch.device, tmp_path: Path) -> Training:
    """A model and its optimizer after one update."""
    made = build_training(config_of(tmp_path), VOCABULARY, grid)
    update(made)
    return made

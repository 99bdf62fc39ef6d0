"""Real runs with trackers: one launch of many in-process ones, and what each said."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.processes import Launcher, records
from tests.metrics.trackers import tracked_worker
from tests.support.distributed_runner import run_ranks

WANDB = {"tracker": "wandb", "project": "tested", "group": "some", "tags": ["a", "b"]}
TENSORBOARD = {"tracker": "tensorboard"}
RUNS: list[dict[str, Any]] = [
    {"name": "plain", "logging": {}},
    {"name": "wandb", "logging": WANDB},
    {"name": "wandb_resumed", "logging": WANDB, "disturb": "interrupt", "forget": 3},
    {"name": "wandb_no_folder", "logging": WANDB, "prepare": "file_in_place_of_folder"},
    {"name": "wandb_killed", "logging": WANDB, "disturb": "kill"},
    {"name": "wandb_stopped", "logging": WANDB, "disturb": "stop"},
    {"name": "tensorboard", "logging": TENSORBOARD},
    {"name": "tensorboard_resumed", "logging": TENSORBOARD, "disturb": "interrupt", "forget": 3},
    {"name": "tensorboard_no_folder", "logging": TENSORBOARD, "prepare": "file_in_place_of_folder"},
]


@dataclass(frozen=True)
class Tracked:
    """The runs in `root`; `home` is the home folder they had, empty before."""

    root: Path
    home: Path
    told: dict[str, Any]

    def said(self, name: str) -> str:
        """What rank 0 printed in a run."""
        return self.told[name]["said"]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """metrics.jsonl of a run, the records of a step in one row, without nulls."""
        rows: dict[int, dict[str, Any]] = {}
        for record in records(self.root / name):
            row = rows.setdefault(record["step"], {})
            row |= {key: value for key, value in record.items() if value is not None}
        return list(rows.values())


@pytest.fixture(scope="session")
def no_account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder without credentials of W&B, and no variable that gives any."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for variable in [name for name in os.environ if name.startswith(("WANDB_", "NETRC", "XDG_"))]:
            patch.delenv(variable)
        patch.setenv("HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def tracked(no_account: Path, sample_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """All of RUNS, trained."""
    for package in ("wandb", "tensorboard"):
        pytest.importorskip(package, reason=f"the extra {package} is not installed")
    root = tmp_path_factory.mktemp("tracked")
    told = run_ranks(tracked_worker.train_tracked, 2, root=str(root), cache=str(sample_cache), runs=RUNS)
    return Tracked(root, no_account, told[0])


@pytest.fixture
def launcher(no_account: Path, sample_cache: Path, tmp_path: Path) -> Launcher:
    """Starts runs that a test disturbs."""
    return Launcher(tmp_path, sample_cache)

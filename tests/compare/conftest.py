"""Run folders in the trainer's format, with curves whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.compare.run_records import COMPARABLE, straight, training, validation


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder from its name, its records (or raw lines), and changes to run.json and its `comparable`."""

    def make(
        name: str, records: Sequence[dict[str, Any] | str], /, comparable: dict[str, Any] | None = None, **info: Any
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        lines = [record if isinstance(record, str) else json.dumps(record) + "\n" for record in records]
        (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf8")
        run = {
            "name": name,
            "status": "finished",
            "parameters": 5_000_000,
            "steps": 40,
            "comparable": COMPARABLE | (comparable or {}),
            "attention": {"pattern": "dense", "window": 64},
            "flops_per_token": {"flops/model": 4000},
            "devices": "CPU",
            "world_size": 1,
        }
        (folder / "run.json").write_text(json.dumps(run | info), encoding="utf8")
        return folder

    return make


@pytest.fixture
def dense(make_run: Callable[..., Path]) -> Path:
    """Falls 6, 5, 4, 3.5, 3 over 40 steps at 4000 FLOPs and 2 milliseconds a token."""
    losses = zip((0, 10, 20, 30, 40), (6.0, 5.0, 4.0, 3.5, 3.0), strict=True)
    steps = [training(step, 6.0 - step / 15) for step in range(1, 41)]
    records = [*steps, *(validation(step, loss) for step, loss in losses)]
    return make_run("dense", sorted(records, key=lambda record: record["step"]))


@pytest.fixture
def sep(make_run: Callable[..., Path]) -> Path:
    """Falls 6, 5.5, 4.25, 3.75, 3.25 over the same steps at three quarters of the cost of a token."""
    losses = zip((0, 10, 20, 30, 40), (6.0, 5.5, 4.25, 3.75, 3.25), strict=True)
    steps = [training(step, 6.0 - step / 16, cost=3.0) for step in range(1, 41)]
    records = [*steps, *(validation(step, loss, cost=3.0) for step, loss in losses)]
    ordered = sorted(records, key=lambda record: record["step"])
    return make_run("sep", ordered, attention={"pattern": "sep", "window": 64})


@pytest.fixture
def make_seeds(make_run: Callable[..., Path]) -> Callable[..., list[Path]]:
    """Writes one run per seed with a config.yaml, from {seed: steps to a loss of 5, or records}."""

    def make(name: str, seeds: dict[int, Any], cost: float = 4.0, **info: Any) -> list[Path]:
        folders = []
        for seed, curve in seeds.items():
            records = curve if isinstance(curve, list) else straight(curve, cost)
            folder = make_run(f"{name}_seed{seed}", records, comparable={"seed_of_data_order": seed}, **info)
            config = {"name": folder.name, "seed": seed, "run_root": str(folder.parent), "resume": "auto"}
            (folder / "config.yaml").write_text(yaml.safe_dump({**config, "attention": {"pattern": name}}))
            folders.append(folder)
        return folders

    return make

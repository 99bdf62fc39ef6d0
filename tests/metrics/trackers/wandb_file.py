"""What an offline run of W&B has recorded, from the file that it leaves."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.metrics.wandb_tracker import messages

protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="the extra wandb is not installed")


@dataclass
class Recorded:
    """What is in a .wandb file: `history` has a row for each step, `axes` the x-axis of each defined metric."""

    run_id: str = ""
    project: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    exit_code: int | None = None
    preempting: bool = False
    kinds: set[str] = field(default_factory=set)


def read(run_folder: Path) -> Recorded:
    """The one offline run of a run's folder."""
    (file,) = (run_folder / "wandb").glob("offline-run-*/run-*.wandb")
    return read_file(file)


def read_file(file: Path) -> Recorded:
    """A .wandb file."""
    found = Recorded()
    content = file.read_bytes()
    assert content.startswith(b":W&B")
    for data in messages(content):
        record = protocol.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        found.kinds.add(kind)
        if kind == "run":
            run = record.run
            found.run_id, found.project, found.group = run.run_id, run.project, run.run_group
            found.tags = list(run.tags)
            found.config |= {item.key: json.loads(item.value_json) for item in run.config.update}
        elif kind == "history":
            found.history.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
        elif kind == "metric":
            found.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
        elif kind == "preempting":
            found.preempting = True
    return found

"""Reading run folders: run.json and metrics.jsonl."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import UserError

# What every record counts since the start of training.
CUMULATIVE = ("tokens", "seconds", "flops/model", "flops/dense", "flops/paper")
LOSS = "val/loss"

Record = dict[str, Any]


@dataclass
class Run:
    """A run as its folder tells it; `label` is its name, made unique among the runs compared."""

    folder: Path
    label: str
    info: Record
    training: list[Record] = field(default_factory=list)
    validation: list[Record] = field(default_factory=list)

    @property
    def metrics_file(self) -> Path:
        """Where the records come from."""
        return self.folder / "metrics.jsonl"

    @property
    def seed(self) -> int | None:
        """Seed of the weights and of the order of the data; None when run.json does not tell."""
        seed = self.info["comparable"].get("seed_of_data_order")
        return seed if isinstance(seed, int) else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders in the order given, with labels that tell them apart.

    Raises UserError for a folder given twice and for whatever `read_run` refuses.
    """
    refuse_twins(folders)
    runs = [read_run(folder) for folder in folders]
    tell_apart(runs)
    return runs


def refuse_twins(folders: Sequence[Path]) -> None:
    """Raise UserError for a folder given twice."""
    seen: dict[Path, Path] = {}
    for folder in folders:
        twin = seen.setdefault(folder.resolve(), folder)
        if twin is not folder:
            raise UserError(f"{folder} is the same run as {twin}: name each run once.")


def tell_apart(runs: Sequence[Run]) -> None:
    """Add the folder to labels that several runs have."""
    names = [run.label for run in runs]
    for run in runs:
        if names.count(run.label) > 1:
            run.label = f"{run.label} ({run.folder})"


def read_run(folder: Path) -> Run:
    """Read one run folder.

    Raises UserError when the folder, its run.json or its metrics.jsonl is missing or unreadable.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of a run, such as runs/NAME.")
    path = folder / "run.json"
    try:
        info = json.loads(_read(path, "every run writes one when it starts"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON (line {error.lineno}: {error.msg}).") from None
    if not isinstance(info, dict) or not isinstance(info.get("comparable"), dict):
        raise UserError(f"{path} has no 'comparable' object, so the run cannot be compared with another.")
    run = Run(folder, str(info.get("name") or folder.name), info)
    for record in _latest(_records(run.metrics_file)):
        if LOSS in record:
            run.validation.append(record)
        if "train/loss" in record:
            run.training.append(record)
    return run


def _read(path: Path, hint: str) -> str:
    """Text of a file; `hint` says where it should have come from."""
    try:
        return path.read_text(encoding="utf8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {hint}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def _records(path: Path) -> Iterator[Record]:
    """Records of a metrics.jsonl in file order; a last line without its end is still being written and left out."""
    lines = _read(path, "the run has logged nothing yet").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise UserError(f"{path} line {number} is not JSON ({error.msg}): repair or delete that line.") from None
        yield _checked(record, f"{path} line {number}")


def _checked(record: Any, where: str) -> Record:
    """The record with null read as nan; raises UserError unless it counts what every record must count."""
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object.")
    record = {key: math.nan if value is None else value for key, value in record.items()}
    for key in ("step", *CUMULATIVE):
        if not _is_count(record.get(key)):
            raise UserError(f"{where} has no number of 0 or more for {key!r}: every record must have one.")
    for key in record:
        if key.endswith("loss") and not isinstance(record[key], int | float):
            raise UserError(f"{where}: {key!r} must be a number, not {record[key]!r}.")
    return record


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _latest(records: Iterator[Record]) -> list[Record]:
    """Records in the order of their steps, without those that a resumed run has written again.

    A step lower than the one before it is a resume: everything later is of the abandoned part of the run.
    """
    kept: dict[tuple[int, bool, bool], Record] = {}
    newest = -1
    for record in records:
        step = record["step"]
        if step < newest:
            kept = {key: value for key, value in kept.items() if key[0] <= step}
        kept[step, "train/loss" in record, LOSS in record] = record
        newest = step
    return [kept[key] for key in sorted(kept)]

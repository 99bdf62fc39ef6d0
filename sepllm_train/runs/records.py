"""Reading run folders: run.json and metrics.jsonl."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from sepllm_train.base.errors import UserError
from sepllm_train.base.parsing import WIDEST_COUNT, parse_json_object, read_bytes, read_json
from sepllm_train.config.compatibility import DATA, EARLIER_DATA, same_data, with_current_keys
from sepllm_train.runs.padding import without_padding

# What every record counts since the start of training.
CUMULATIVE = ("tokens", "seconds", "flops/model", "flops/dense", "flops/paper")
LOSS = "val/loss"
# Beginning of the keys of scores: eval/TASK/METRIC. Records of evaluations have the key of their seconds.
SCORE = "eval/"
_EVALUATED = "eval/seconds"
# The most that a record may count: beyond any run, and within the range of float32, in which curves are drawn.
LARGEST = 1e30
# Beginnings of the keys under which a record holds numbers.
_METRICS = ("train/", "val/", "checkpoint/", SCORE)
_LONGEST_NAME = 255
_SCORE = re.compile(r"eval/([\w.-]{1,64})/([\w./-]{1,64})(?<!_stderr)", re.ASCII)
_CHECKPOINT = re.compile(r"step_(\d{8,18})")

Record = dict[str, Any]


@dataclass
class Run:
    """Records of a run; `label` is its name, made unique among the runs compared.

    `gap` says why records before its own first one are missing, and is empty where none are.
    """

    folder: Path
    label: str
    info: Record
    training: list[Record] = field(default_factory=list)
    validation: list[Record] = field(default_factory=list)
    evaluation: list[Record] = field(default_factory=list)
    gap: str = ""

    @property
    def metrics_file(self) -> Path:
        """The file that holds the records."""
        return self.folder / "metrics.jsonl"

    @property
    def seed(self) -> int | None:
        """Seed of the weights and of the order of the data; None when run.json does not record it."""
        seed = self.info["comparable"].get("seed_of_data_order")
        return seed if isinstance(seed, int) else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders in the order given, with labels that differ.

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
    """Read one run folder, with the records of the run that it went on from up to there.

    Raises UserError when the folder, its run.json or its metrics.jsonl is missing or unreadable.
    """
    info = _read_info(folder)
    records, gap = _history(folder, info, [])
    info, _ = without_padding(info)
    run = Run(folder, name_of(info, folder), info, gap=gap)
    for record in records:
        if LOSS in record:
            run.validation.append(record)
        if "train/loss" in record:
            run.training.append(record)
        if _EVALUATED in record:
            run.evaluation.append(record)
    return run


def score_of(key: str) -> tuple[str, str] | None:
    """(task, metric) of the key of a score in a record; None for other keys, also for those of standard errors."""
    found = _SCORE.fullmatch(key)
    return None if found is None else (found[1], found[2])


def name_of(info: Record, folder: Path) -> str:
    """Name of a run in run.json, or of its folder where that gives none that can be printed in a line."""
    name = info.get("name")
    if isinstance(name, str) and 0 < len(name) <= _LONGEST_NAME and name.isprintable():
        return name
    return folder.name


def _read_info(folder: Path) -> Record:
    """run.json. Raises UserError when it is missing, or lacks what a comparison needs."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder: give the folder of a run, such as runs/NAME.")
    path = folder / "run.json"
    info = read_json(path, "every run writes one when it starts", nan=True)
    if not isinstance(info.get("comparable"), dict):
        raise UserError(f"{path} has no 'comparable' object, so the run cannot be compared with another.")
    return with_current_keys(info)


def _history(folder: Path, info: Record, later: Sequence[Path]) -> tuple[list[Record], str]:
    """Records of a run and, up to where it went on from another, of that one; and `gap` of Run.

    `later`: the runs that continue this one. Raises UserError when the run's own records cannot be read.
    """
    _, corrected = without_padding(info)
    own = _latest(map(corrected, _records(folder / "metrics.jsonl")))
    later = [*later, folder.resolve()]
    origin = _origin(info)
    if not own or origin is None:
        return own, ""
    parent = origin.parent.parent if _CHECKPOINT.fullmatch(origin.name) else origin
    # A run that was continued in its own folder may name itself.
    if parent.resolve() in later:
        return own, ""
    try:
        before = _read_info(parent)
        if not _same_model(before.get("identity"), info.get("identity")):
            raise UserError(f"{parent} is another run by now.")
        earlier, gap = _history(parent, before, later)
    except UserError as error:
        reason = str(error).rstrip(".") if os.path.exists(parent) else f"{parent} is not there"
        return own, f"the records before step {own[0]['step']}, of the run that it went on from, are missing ({reason})"
    last = _went_on_at(origin, own[0])
    return _latest(chain((record for record in earlier if record["step"] <= last), own)), gap


def _origin(info: Record) -> Path | None:
    """The checkpoint or the run that a run went on from; None without one, and for what cannot be a path."""
    origin = info.get("origin")
    if not isinstance(origin, str) or "\0" in origin:
        return None
    parts = Path(origin).parts
    return Path(origin) if all(len(os.fsencode(part)) <= _LONGEST_NAME for part in parts) else None


def _same_model(ours: Any, theirs: Any) -> bool:
    """True where the `identity` of two runs in run.json has no key with different values.

    `theirs` is of the run that continued the other, possibly with other data, which it then records.
    """
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return True
    earlier = theirs.get(EARLIER_DATA)
    last = earlier[-1] if isinstance(earlier, list) and earlier else {}
    before = last.get("data") if isinstance(last, dict) else None
    switched = same_data(before, ours.get(DATA)) and not same_data(earlier or [{}], ours.get(EARLIER_DATA))
    told = {key: value for key, value in theirs.items() if not (switched and key.startswith("data"))}
    return all(same_data(ours.get(key, value), value) for key, value in told.items())


def _went_on_at(origin: Path, first: Record) -> int:
    """The step at which a run went on from `origin`, a checkpoint or the folder of a run; `first`: its first record."""
    if match := _CHECKPOINT.fullmatch(origin.name):
        return int(match[1])
    # A run that begins with a validation or an evaluation is where it went on; any other record comes steps later.
    if LOSS in first or _EVALUATED in first:
        return int(first["step"])
    found = (_CHECKPOINT.fullmatch(path.name) for path in (origin / "checkpoints").glob("step_*"))
    steps = [int(match[1]) for match in found if match]
    return max((step for step in steps if step < first["step"]), default=int(first["step"]) - 1)


def _records(path: Path) -> Iterator[Record]:
    """Records of a metrics.jsonl in file order; a last line without its end is still being written and left out."""
    lines = read_bytes(path, "the run has logged nothing yet").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = parse_json_object(line, where, "repair or delete that line", nan=True, widest=WIDEST_COUNT)
        except UserError:
            if number == len(lines):
                return
            raise
        yield _checked(record, where)


def _checked(record: Record, where: str) -> Record:
    """The record with null read as nan, as are measured numbers beyond LARGEST; raises UserError unless it counts what
    every record must count, and its metrics are numbers."""
    for key in ("step", *CUMULATIVE):
        if not _is_count(record.get(key)) or (key == "step" and record[key] != int(record[key])):
            raise UserError(f"{where} has no number of 0 or more for {key!r}: every record must have one.")
    checked = {}
    for key, value in record.items():
        if key.startswith(_METRICS) and value is not None and not _is_number(value):
            raise UserError(f"{where}: {key[:_LONGEST_NAME]!r} must be a number, not {repr(value)[:60]}.")
        out_of_range = value is None or (_is_number(value) and not abs(value) <= LARGEST)
        checked[key] = math.nan if out_of_range else value
    return checked | {"step": int(record["step"])}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= LARGEST


def _latest(records: Iterable[Record]) -> list[Record]:
    """Records in the order of their steps, without those that a resumed run has written again.

    A step lower than the one before it is a resume: everything later is of the abandoned part of the run.
    """
    kept: dict[tuple[int, bool, bool, bool], Record] = {}
    newest = -1
    for record in records:
        step = record["step"]
        if step < newest:
            kept = {key: value for key, value in kept.items() if key[0] <= step}
        kept[step, "train/loss" in record, LOSS in record, _EVALUATED in record] = record
        newest = step
    return [kept[key] for key in sorted(kept)]

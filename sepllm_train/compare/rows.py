"""Rows of a comparison: the runs that differ in nothing but their seed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sepllm_train.base.errors import UserError
from sepllm_train.compare.comparable import check_comparable, check_conventions, check_counts
from sepllm_train.compare.curves import check_curves, check_length
from sepllm_train.compare.timing import RowTiming
from sepllm_train.runs.records import Run, read_run, refuse_twins, tell_apart

# What may differ between the seeds of a row.
FREE_KEYS = ("seed", "name", "run_root", "resume")
SEED_SUFFIX = re.compile(r"(?:[-_.]?seed|[-_.]s)[-_]?(\d+)$")


@dataclass
class Row:
    """Runs of one configuration, one per seed; `timing` is set when seconds are those of a timing benchmark."""

    label: str
    runs: list[Run]
    timing: RowTiming | None = None

    @property
    def seeds(self) -> int:
        """Number of runs."""
        return len(self.runs)


def _warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr)


def read_rows(
    folders: Sequence[Path],
    *,
    groups: bool = True,
    strict: bool = False,
    tell: Callable[[str], None] = _warn,
) -> list[Row]:
    """Read run folders as rows, in the order in which they are given; the first row is the reference.

    Runs whose config.yaml differs in FREE_KEYS alone form one row, unless `groups` is false; a run without a readable
    config.yaml is a row of its own, and so is one that repeats the seed of another. A run that cannot be compared
    (nothing logged, fewer than two validation points, broken records, mixed conventions) is left out, and `tell` gets
    a sentence that names it; another names a run that went on from one whose records are missing. Raises UserError for
    a run that would be left out when `strict`, when the reference has no run left or no two rows are left; and always
    for a folder that is not there or given twice, and for runs of different data, tokenizers or the like, or without
    tokens in common.
    """
    if len(folders) < 2:
        raise UserError("A comparison needs at least two run folders, and one was given.")
    refuse_twins(folders)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give the folder of a run, such as runs/NAME.")
    runs, left_out = _usable(folders, strict)
    keys = [_settings(folder) if groups else str(folder) for folder in folders]
    reasons = f": {' '.join(left_out)}" if left_out else "."
    if runs and not any(folder in runs for folder, key in zip(folders, keys, strict=True) if key == keys[0]):
        raise UserError(f"{folders[0]} is the reference, which cannot be left out{reasons}")
    tell_apart(list(runs.values()))
    gathered = _gather(folders, keys, runs)
    if len(gathered) < 2:
        raise UserError(_too_few(gathered, len(folders), left_out, reasons))
    check_comparable(list(runs.values()))
    check_curves(list(runs.values()))
    rows = [Row(label, row) for label, row in zip(_labels(gathered, groups), gathered, strict=True)]
    for sentence in left_out:
        tell(f"Left out: {sentence}")
    for run in runs.values():
        if run.gap:
            tell(f"{run.label}: {run.gap}.")
    return rows


def runs_of(rows: Sequence[Row]) -> list[Run]:
    """The runs of all rows."""
    return [run for row in rows for run in row.runs]


def pairs(row: Row, reference: Row) -> list[tuple[Run, Run]]:
    """(run, run of the reference with the same seed), for each seed that both rows have.

    Two rows of a single run each are paired whatever their seeds are. The same seed gives the same order of the data
    and the same held-out sequences, so what these add to a loss is no part of the difference of a pair.
    """
    if row.seeds == reference.seeds == 1:
        return [(row.runs[0], reference.runs[0])]
    partners = {run.seed: run for run in reference.runs}
    return [(run, partners[run.seed]) for run in row.runs if run.seed in partners]


def pairing_notes(rows: Sequence[Row]) -> list[str]:
    """Sentences on runs that have no partner in the first row."""
    notes = []
    for row in rows[1:]:
        paired = pairs(row, rows[0])
        ours, theirs = {run.seed for run, _ in paired}, {run.seed for _, run in paired}
        for one, other, seeds in ((row, rows[0], ours), (rows[0], row, theirs)):
            alone = [str(run.seed) for run in one.runs if run.seed not in seeds]
            if alone:
                words = ("Seeds", "have", "them") if len(alone) > 1 else ("Seed", "has", "it")
                notes.append(
                    f"{words[0]} {', '.join(alone)} of {one.label} {words[1]} no partner in {other.label}: ratios and "
                    f"differences between the two leave {words[2]} out."
                )
    return notes


def _usable(folders: Sequence[Path], strict: bool) -> tuple[dict[Path, Run], list[str]]:
    """Runs by folder, and sentences on those that cannot be compared; `strict` raises the first of these."""
    runs: dict[Path, Run] = {}
    left_out = []
    for folder in folders:
        try:
            run = read_run(folder)
            check_length(run)
            check_counts(run)
            check_conventions(run, next(iter(runs.values()), run))
        except UserError as error:
            if strict:
                raise
            left_out.append(str(error))
        else:
            runs[folder] = run
    return runs, left_out


def _settings(folder: Path) -> str:
    """The configuration of a run apart from FREE_KEYS, to compare; the folder itself where none can be read."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf8"))
        if not isinstance(config, dict) or "seed" not in config:
            return str(folder)
        told = {key: value for key, value in config.items() if key not in FREE_KEYS}
        return yaml.safe_dump(_without_empty(told), sort_keys=True)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return str(folder)


def _without_empty(value: Any) -> Any:
    """A value without what is empty in it: a run that is older than a key is as one that leaves it empty."""
    if not isinstance(value, dict):
        return value
    kept = {key: _without_empty(entry) for key, entry in value.items()}
    return {
        key: entry for key, entry in kept.items() if entry is not None and entry is not False and entry not in ([], {})
    }


def _gather(folders: Sequence[Path], keys: Sequence[str], runs: dict[Path, Run]) -> list[list[Run]]:
    """Runs of equal keys together, in the order of the folders; a second run of a seed begins another row."""
    gathered: dict[tuple[str, int], list[Run]] = {}
    for folder, key in zip(folders, keys, strict=True):
        # A run left out keeps the place of its row.
        gathered.setdefault((key, 0), [])
        if (run := runs.get(folder)) is not None:
            number = 0
            while any(run.seed == other.seed for other in gathered.get((key, number), [])):
                number += 1
            gathered.setdefault((key, number), []).append(run)
    return [row for row in gathered.values() if row]


def _labels(gathered: Sequence[list[Run]], groups: bool) -> list[str]:
    """Names of rows: that of their runs without the seed where it is unique, else the first run's."""
    stems = [_stem(row) if groups else row[0].label for row in gathered]
    return [
        stem if stems.count(stem) == 1 and stem else row[0].label for stem, row in zip(stems, gathered, strict=True)
    ]


def _stem(row: Sequence[Run]) -> str:
    """What the names of a row's runs have in common when the seed is taken off; the first name if nothing."""
    found = [SEED_SUFFIX.search(run.label) for run in row]
    stems = {run.label[: match.start()] if match else run.label for run, match in zip(row, found, strict=True)}
    # A single run may well be called sep_s64 for another reason than its seed.
    alone = len(row) == 1 and found[0] is not None and found[0][1] != str(row[0].seed)
    return row[0].label if len(stems) > 1 or alone else stems.pop()


def _too_few(gathered: Sequence[list[Run]], given: int, left_out: Sequence[str], reasons: str) -> str:
    """Sentence that there are not two rows."""
    if not gathered:
        return f"None of the {given} runs can be compared{reasons}"
    if not left_out:
        return (
            f"The {given} runs differ only in their seed, so they form one row: add runs of another configuration, or "
            "compare them one by one with --no-groups."
        )
    return f"Only {gathered[0][0].label} is left to compare of {given} runs{reasons}"

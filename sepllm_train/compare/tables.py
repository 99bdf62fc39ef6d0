"""The figures of a comparison as tables of finished text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sepllm_train.base.console import quantity
from sepllm_train.compare.cells import (
    columns,
    cost_text,
    difference_text,
    estimate_text,
    ratio_text,
    run_cost,
    setting_text,
)
from sepllm_train.compare.comparable import differences
from sepllm_train.compare.curves import common_tokens, final_loss, points
from sepllm_train.compare.results import NOT_REACHED, Ratio, RowAtTokens, RowReach, difference, mean, value_at
from sepllm_train.compare.rows import Row, pairs, runs_of
from sepllm_train.runs.records import LOSS

QUARTERS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Table:
    """A titled table of finished text; the first column names the row, the others hold figures."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Markdown with aligned columns, which reads as well on a terminal."""
        lines = [[cell.replace("|", "\\|") for cell in line] for line in [self.header, *self.rows]]
        widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(self.header))]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        padded = [
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
            for line in [lines[0], rule, *lines[1:]]
        ]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in padded) + "\n"


def several_seeds(rows: Sequence[Row]) -> bool:
    """Whether any row has more than one run."""
    return any(row.seeds > 1 for row in rows)


def to_reach(rows: Sequence[Row], reaches: Sequence[RowReach], flops: str, target: str) -> Table:
    """What each row spent to reach the loss that `target` names, and its ratio to the first row's."""
    lines = []
    for number, (row, found) in enumerate(zip(rows, reaches, strict=True)):
        alone = len(found.runs) < 2
        line = _head(row, rows)
        for column, (key, show) in enumerate(columns(flops)):
            ratio = ratio_text(found.ratios[key], reference=number == 0, bounds=not alone)
            line += [
                cost_text(found, key, show, first=column == 0),
                "" if alone and found.count(NOT_REACHED) else ratio,
            ]
        lines.append(line)
    names = [_seconds(rows) if key == "seconds" else key for key, _ in columns(flops)]
    ratios = [_ratio_title(found.ratios[key] for found in reaches[1:]) for key, _ in columns(flops)]
    header = [word for pair in zip(names, ratios, strict=True) for word in pair]
    return Table(f"To reach {target}", [*_head_title(rows), *header], lines)


def at_equal_tokens(rows: Sequence[Row], equal: Sequence[RowAtTokens], flops: str) -> Table:
    """Loss, bits per byte, FLOPs and seconds of each row at one number of tokens."""
    lines = []
    for number, (row, found) in enumerate(zip(rows, equal, strict=True)):
        change = "-" if number == 0 or found.difference is None else difference_text(found.difference)
        line = [*_head(row, rows), f"{found.loss:.4f}", change, "-" if found.bits is None else f"{found.bits:.4f}"]
        for key, show in columns(flops)[:2]:
            line += [show(found.costs[key]), ratio_text(found.ratios[key], reference=number == 0)]
        lines.append(line)
    later = equal[1:]
    measured = any(found.difference is not None and found.difference.low is not None for found in later)
    header = ["loss", "difference [95%]" if measured else "difference", "bits/byte"]
    header += [f"flops/{flops}", _ratio_title(found.ratios[f"flops/{flops}"] for found in later)]
    header += [_seconds(rows), _ratio_title(found.ratios["seconds"] for found in later)]
    return Table(f"At {quantity(equal[0].tokens)} tokens", [*_head_title(rows), *header], lines)


def seed_by_seed(rows: Sequence[Row], reaches: Sequence[RowReach], flops: str) -> Table | None:
    """Every run's own costs to reach the loss and its ratio to its partner; None unless a row has several runs."""
    if not several_seeds(rows):
        return None
    lines = []
    for row, found in zip(rows, reaches, strict=True):
        paired = [run.label for run, _ in pairs(row, rows[0])]
        final = {run.label: final_loss(run) for run in row.runs}
        for run in found.runs:
            line = [row.label, str(run.seed), f"{final[run.run]:.4f}", f"{run.target:.4f}"]
            for key, show in columns(flops):
                ratios = dict(zip(paired, found.ratios[key].seeds, strict=True))
                ratio = ratios.get(run.run)
                line += [run_cost(run, key, show), "-" if ratio is None else f"{ratio:.3f}x"]
            lines.append(line)
    header = ["row", "seed", "final loss", "to reach", f"flops/{flops}", "ratio"]
    return Table("Seed by seed", [*header, _seconds(rows), "ratio", "tokens", "ratio"], lines)


def step_times(rows: Sequence[Row]) -> Table | None:
    """Seconds of a step of each row and its ratio to the first row's; None without a timing file."""
    first = rows[0].timing
    if first is None:
        return None
    lines = []
    for row in rows:
        if row.timing is not None:
            ratio = "1.000x" if row is rows[0] else estimate_text(row.timing.ratio(first))
            lines.append([row.label, f"{row.timing.step_seconds:.4g}", ratio, str(len(row.timing.turns))])
    return Table("Timed steps", ["row", "seconds of a step", "ratio [95%]", "turns"], lines)


def along_tokens(rows: Sequence[Row]) -> Table:
    """Mean loss of each row, and its distance from the first's, at quarters of the tokens they share."""
    lines = []
    for share in QUARTERS:
        tokens = share * common_tokens(runs_of(rows))
        loss = value_at(tokens)
        losses = [mean(row, loss) for row in rows]
        if not any(math.isnan(loss) for loss in losses):
            line = [quantity(tokens), f"{losses[0]:.4f}"]
            for row, other in zip(rows[1:], losses[1:], strict=True):
                change = difference(row, rows[0], loss)
                line.append(f"{other:.4f} ({'-' if change is None else f'{change.mean:+.4f}'})")
            lines.append(line)
    return Table("Validation loss at equal tokens", ["tokens", *(row.label for row in rows)], lines)


def by_dataset(rows: Sequence[Row]) -> Table | None:
    """Mean loss on each dataset of the blend at the most tokens the runs share; None unless there are several."""
    runs = runs_of(rows)
    names = [k for k in points(runs[0])[-1] if k.startswith("val/") and k.endswith("/loss") and k != LOSS]
    common = [name for name in names if all(len(points(run, name)) > 1 for run in runs)]
    if len(common) < 2:
        return None
    tokens = common_tokens(runs)
    lines = [[row.label, *(f"{mean(row, value_at(tokens, name, name)):.4f}" for name in common)] for row in rows]
    header = [_kind(rows), *(name.removeprefix("val/").removesuffix("/loss") for name in common)]
    return Table(f"Validation loss by dataset at {quantity(tokens)} tokens", header, lines)


def what_differs(rows: Sequence[Row]) -> Table:
    """The settings in which the runs differ; several values within a row stand side by side."""
    lines = []
    for name, values in differences(runs_of(rows)).items():
        rest = iter(values)
        cells = [dict.fromkeys(setting_text(next(rest)) for _ in row.runs) for row in rows]
        lines.append([name, *(" / ".join(cell) for cell in cells)])
    return Table(f"What differs between the {_kind(rows)}s", ["setting", *(row.label for row in rows)], lines)


def _kind(rows: Sequence[Row]) -> str:
    """What a line of a table is."""
    return "row" if several_seeds(rows) else "run"


def _head(row: Row, rows: Sequence[Row]) -> list[str]:
    return [row.label, str(row.seeds)] if several_seeds(rows) else [row.label]


def _head_title(rows: Sequence[Row]) -> list[str]:
    return ["row", "seeds"] if several_seeds(rows) else ["run"]


def _ratio_title(ratios: Iterable[Ratio]) -> str:
    """Says that there are intervals where there are."""
    return "ratio [95%]" if any(r.estimate is not None and r.estimate.low is not None for r in ratios) else "ratio"


def _seconds(rows: Sequence[Row]) -> str:
    """Says which seconds they are."""
    return "seconds" if rows[0].timing is None else "seconds (timed steps)"

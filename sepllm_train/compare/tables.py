"""The figures of a comparison as tables, and the sentence that sums them up."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sepllm_train.compare.comparable import differences
from sepllm_train.compare.curves import at_tokens, best_loss, common_tokens, first_reach, points
from sepllm_train.compare.records import CUMULATIVE, LOSS, Run
from sepllm_train.console import duration, quantity

BITS = "val/bits_per_byte"
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


def to_reach(runs: Sequence[Run], loss: float, flops: str) -> Table:
    """What each run spent to reach validation loss `loss`, and its ratio to the first run's."""
    reached = [first_reach(run, loss) for run in runs]
    rows = []
    for run, spent in zip(runs, reached, strict=True):
        if spent is None:
            rows.append([run.label, f"not reached (best {best_loss(run):.4f})", *[""] * 5])
            continue
        row = [run.label]
        for key, show in ((f"flops/{flops}", _flops), ("seconds", duration), ("tokens", quantity)):
            row.append(("" if spent.exact else "at most ") + show(spent.spent[key]))
            comparable = reached[0] is not None and reached[0].exact and spent.exact
            row.append(_ratio(spent.spent[key], reached[0].spent[key]) if reached[0] and comparable else "-")
        rows.append(row)
    header = ["run", f"flops/{flops}", "ratio", "seconds", "ratio", "tokens", "ratio"]
    return Table(f"To reach validation loss {loss:.4f}", header, rows)


def at_equal_tokens(runs: Sequence[Run], flops: str) -> Table:
    """Loss, bits per byte, FLOPs and seconds of each run at the most tokens they share."""
    tokens = common_tokens(runs)
    first = [at_tokens(runs[0], tokens, key) for key in (LOSS, f"flops/{flops}", "seconds")]
    rows = []
    for run in runs:
        loss, spent, seconds = (at_tokens(run, tokens, key) for key in (LOSS, f"flops/{flops}", "seconds"))
        bits = at_tokens(run, tokens, BITS, BITS)
        difference = "-" if run is runs[0] else f"{loss - first[0]:+.4f}"
        row = [run.label, f"{loss:.4f}", difference, "-" if math.isnan(bits) else f"{bits:.4f}"]
        rows.append([*row, _flops(spent), _ratio(spent, first[1]), duration(seconds), _ratio(seconds, first[2])])
    header = ["run", "loss", "difference", "bits/byte", f"flops/{flops}", "ratio", "seconds", "ratio"]
    return Table(f"At {quantity(tokens)} tokens", header, rows)


def along_tokens(runs: Sequence[Run]) -> Table:
    """Loss of each run, and its distance from the first's, at quarters of the tokens they share."""
    rows = []
    for share in QUARTERS:
        tokens = share * common_tokens(runs)
        losses = [at_tokens(run, tokens) for run in runs]
        if not any(math.isnan(loss) for loss in losses):
            others = [f"{loss:.4f} ({loss - losses[0]:+.4f})" for loss in losses[1:]]
            rows.append([quantity(tokens), f"{losses[0]:.4f}", *others])
    return Table("Validation loss at equal tokens", ["tokens", *(run.label for run in runs)], rows)


def by_dataset(runs: Sequence[Run]) -> Table | None:
    """Loss on each dataset of the blend at the most tokens the runs share; None unless there are several."""
    names = [k for k in points(runs[0])[-1] if k.startswith("val/") and k.endswith("/loss") and k != LOSS]
    common = [name for name in names if all(len(points(run, name)) > 1 for run in runs)]
    if len(common) < 2:
        return None
    tokens = common_tokens(runs)
    rows = [
        [run.label, *(f"{loss:.4f}" for loss in (at_tokens(run, tokens, name, name) for name in common))]
        for run in runs
    ]
    header = ["run", *(name.removeprefix("val/").removesuffix("/loss") for name in common)]
    return Table(f"Validation loss by dataset at {quantity(tokens)} tokens", header, rows)


def what_differs(runs: Sequence[Run]) -> Table:
    """The settings in which the runs differ."""
    rows = [[name, *(_setting(value) for value in values)] for name, values in differences(runs).items()]
    return Table("What differs between the runs", ["setting", *(run.label for run in runs)], rows)


def verdict(runs: Sequence[Run], loss: float, flops: str) -> str:
    """One sentence per later run on its cost relative to the first, and what one seed allows to say."""
    first = first_reach(runs[0], loss)
    parts = []
    for run in runs[1:]:
        spent = first_reach(run, loss)
        if first is None or spent is None:
            missing = [r.label for r, reach in ((runs[0], first), (run, spent)) if reach is None]
            parts.append(f"{' and '.join(missing)} did not reach validation loss {loss:.4f}.")
        elif not (first.exact and spent.exact):
            parts.append(f"{run.label}: {loss:.4f} lies above a first validation point, so the costs are only bounds.")
        else:
            ratios = [_ratio(spent.spent[k], first.spent[k]) for k in (f"flops/{flops}", "seconds", "tokens")]
            parts.append(
                f"{run.label} reached validation loss {loss:.4f} with {ratios[0]} the FLOPs (flops/{flops}), "
                f"{ratios[1]} the seconds and {ratios[2]} the tokens of {runs[0].label}."
            )
    parts.append(
        "This is one run of each: how much another seed would move these ratios is not known from it, so repeat with "
        "other seeds before concluding anything from a small difference."
    )
    return " ".join(parts)


def curves_csv(runs: Sequence[Run]) -> str:
    """All points of all curves: a row per record, empty where a record does not hold the column."""
    names = {key for run in runs for record in run.validation for key in record if key.startswith("val/")}
    columns = ["step", *CUMULATIVE, "train/loss", LOSS, BITS, *sorted(names - {LOSS, BITS})]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *columns])
    for run in runs:
        records = {id(record): record for record in run.training + run.validation}
        for record in sorted(records.values(), key=lambda record: (record["step"], LOSS in record)):
            writer.writerow([run.label, *(record.get(column, "") for column in columns)])
    return text.getvalue()


def _flops(value: float) -> str:
    figure = quantity(value)
    digits = figure.rstrip("kMGTPEZY")
    return f"{digits} {figure[len(digits) :]}FLOPs"


def _ratio(value: float, reference: float) -> str:
    return f"{value / reference:.3f}x" if reference > 0 else "-"


def _setting(value: Any) -> str:
    return (
        f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else "-" if value is None else str(value)
    )

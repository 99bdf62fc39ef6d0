"""A comparison as a whole: its figures as data, as text, and as the files of a folder."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sepllm_train.base.errors import UserError
from sepllm_train.base.files import write_whole
from sepllm_train.compare import forest, plots, tables
from sepllm_train.compare.comparable import caveats
from sepllm_train.compare.curves import best_loss, common_loss, final_loss
from sepllm_train.compare.page import METHOD, SEEDS, TIMED, page
from sepllm_train.compare.results import BITS, RowAtTokens, RowReach, at_equal_tokens, mean, timed, to_reach
from sepllm_train.compare.rows import Row, pairing_notes, pairs, runs_of
from sepllm_train.compare.student import CONFIDENCE
from sepllm_train.compare.tables import Table, several_seeds
from sepllm_train.compare.timing import Timing
from sepllm_train.compare.verdict import Findings, verdict
from sepllm_train.metrics.flops import CONVENTIONS
from sepllm_train.runs.records import CUMULATIVE, LOSS, Run

# Value of --loss for the reference's final validation loss, seed by seed.
REFERENCE = "reference"


@dataclass(frozen=True)
class Report:
    """A comparison of rows, the first of which is the reference.

    `loss` is the validation loss to reach (nats per token), None for the reference's final one, seed by seed.
    """

    rows: list[Row]
    loss: float | None
    flops: str
    title: str
    reaches: list[RowReach]
    equal: list[RowAtTokens]
    verdict: str
    notes: list[str]
    timing: Timing | None

    def main_tables(self) -> list[Table]:
        """Costs to reach the loss, and losses at equal tokens."""
        return [
            tables.to_reach(self.rows, self.reaches, self.flops, self.target()),
            tables.at_equal_tokens(self.rows, self.equal, self.flops),
        ]

    def all_tables(self) -> list[Table]:
        """Every table that has a line."""
        more = [
            tables.step_times(self.rows),
            tables.seed_by_seed(self.rows, self.reaches, self.flops),
            tables.along_tokens(self.rows),
            tables.by_dataset(self.rows),
            tables.what_differs(self.rows),
        ]
        return self.main_tables() + [table for table in more if table is not None and table.rows]

    def target(self) -> str:
        """The loss to reach, in words."""
        return _target(self.rows, self.loss)

    def convention(self) -> str:
        """How FLOPs are counted."""
        return f"flops/{self.flops}: {CONVENTIONS[self.flops].words}"

    def method(self) -> list[str]:
        """How the figures are made, in paragraphs."""
        return [METHOD, *([SEEDS] if several_seeds(self.rows) else []), *([TIMED] if self.timing else [])]

    def console(self) -> str:
        """What the terminal shows."""
        shown = [table.markdown() for table in self.main_tables()]
        return "\n".join([*shown, self.convention(), "", *self.notes, self.verdict, ""])

    def markdown(self) -> str:
        """The whole comparison as Markdown."""
        head = [f"# {self.title}\n", f"{self.verdict}\n", *(f"- {note}\n" for note in self.notes)]
        body = [table.markdown() for table in self.all_tables()]
        return "\n".join([*head, *body, f"{self.convention()}\n", "\n\n".join(self.method())]) + "\n"

    def data(self) -> dict[str, Any]:
        """All figures as numbers, ready for JSON: null where there is none."""
        rows = [
            {
                "label": row.label,
                "final_loss": mean(row, final_loss),
                "runs": [
                    {
                        "name": run.label,
                        "seed": run.seed,
                        "status": run.info.get("status"),
                        "final_loss": final_loss(run),
                        "best_loss": best_loss(run),
                    }
                    for run in row.runs
                ],
                "pairs": len(pairs(row, self.rows[0])),
                "timing": None if row.timing is None else asdict(row.timing),
            }
            for row in self.rows
        ]
        steps = [_step_ratio(row, self.rows[0]) for row in self.rows]
        return _plain(
            {
                "title": self.title,
                "reference": self.rows[0].label,
                "loss": REFERENCE if self.loss is None else self.loss,
                "flops": self.flops,
                "confidence": CONFIDENCE,
                "corrected_for_rows": False,
                "verdict": self.verdict,
                "notes": self.notes,
                "seconds": "steps" if self.timing is None else "timed steps",
                "machine": None if self.timing is None else self.timing.machine,
                "rows": rows,
                "to_reach": [asdict(found) for found in self.reaches],
                "at_equal_tokens": [asdict(found) for found in self.equal],
                "step_seconds_ratio": steps,
            }
        )

    def files(self) -> dict[str, bytes]:
        """Content of every file of the comparison, by name."""
        drawn = [
            (axis.file, axis.title, plots.draw(self.rows, axis, self.reaches, self.mean_loss()))
            for axis in plots.axes_of(self.flops, self.timing is not None)
        ]
        if forest.has_intervals(self.reaches):
            drawn.append(("ratios", "Ratios", forest.draw(self.rows, self.reaches, self.flops, self.target())))
        drawings = {name: plots.svg(figure) for name, _, figure in drawn}
        files = {f"{name}.svg": drawing.encode() for name, drawing in drawings.items()}
        inlined = [(title, plots.inline(drawings[name], name)) for name, title, _ in drawn]
        files["curves.csv"] = curves_csv(self.rows).encode()
        files["comparison.json"] = (json.dumps(self.data(), indent=2, allow_nan=False) + "\n").encode()
        files["comparison.md"] = self.markdown().encode()
        legend = f"{plots.BAND} " if several_seeds(self.rows) else ""
        files["comparison.html"] = page(
            self.title, self.verdict, self.notes, self.all_tables(), inlined, self.method(), legend
        ).encode()
        return files

    def mean_loss(self) -> float:
        """The loss to reach; the mean over the reference's runs of their final losses."""
        return mean(self.rows[0], final_loss) if self.loss is None else self.loss


def build_report(
    rows: Sequence[Row],
    loss: float | str | None = None,
    flops: str = "model",
    title: str | None = None,
    timing: Timing | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """Compare rows from `read_rows`.

    `loss` in nats per token, or REFERENCE, defaults to the lowest that every run reached; `flops` is a key of
    CONVENTIONS; `notes` are sentences that a reader needs beside those found here. Raises UserError for a loss that no
    run reached and for a row that `timing` does not hold.
    """
    rows = timed(rows, timing) if timing is not None else list(rows)
    runs = runs_of(rows)
    if isinstance(loss, str):
        if loss != REFERENCE:
            raise UserError(f"--loss {loss} must be a validation loss or '{REFERENCE}'.")
        target = None
    else:
        target = common_loss(runs) if loss is None else _reachable(loss, runs)
    reaches, equal = to_reach(rows, target), at_equal_tokens(rows)
    words = _target(rows, target)
    told = [*notes, *pairing_notes(rows), *caveats(runs, _same_orders(rows), timing is not None)]
    return Report(
        rows=rows,
        loss=target,
        flops=flops,
        title=title or f"Comparison of {', '.join(row.label for row in rows)}",
        reaches=reaches,
        equal=equal,
        verdict=verdict(Findings(rows, reaches, equal, words, words if target is not None else "that loss", flops)),
        notes=told + ([timing.words()] if timing is not None else []),
        timing=timing,
    )


def write_report(report: Report, output: Path) -> list[str]:
    """Write every file of a report whole and give their names.

    Raises UserError when the folder or a file cannot be made.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: name a folder.")
    files = report.files()
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(output / name, content)
    except OSError as error:
        raise UserError(f"Cannot write to --output {output}: {error.strerror}.") from None
    return list(files)


def curves_csv(rows: Sequence[Row]) -> str:
    """All points of all curves: a line per record, empty where a record does not hold the column."""
    names = {key for run in runs_of(rows) for record in run.validation for key in record if key.startswith("val/")}
    columns = ["step", *CUMULATIVE, "train/loss", LOSS, BITS, *sorted(names - {LOSS, BITS})]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "run", "seed", *columns])
    for row in rows:
        for run in row.runs:
            records = {id(record): record for record in run.training + run.validation}
            for record in sorted(records.values(), key=lambda record: (record["step"], LOSS in record)):
                values = (record.get(column, "") for column in columns)
                writer.writerow([row.label, run.label, "" if run.seed is None else run.seed, *values])
    return text.getvalue()


def _target(rows: Sequence[Row], loss: float | None) -> str:
    if loss is not None:
        return f"validation loss {loss:.4f}"
    reference = rows[0]
    mean_words = f"{mean(reference, final_loss):.4f}"
    if reference.seeds == 1:
        return f"the final validation loss of {reference.label} ({mean_words})"
    return f"the final validation loss of {reference.label} of the same seed (mean {mean_words})"


def _reachable(loss: float, runs: Sequence[Run]) -> float:
    """`loss`, if it is a loss that some run reached; raises UserError otherwise."""
    lowest = min(runs, key=best_loss)
    if not math.isfinite(loss) or loss < best_loss(lowest):
        raise UserError(f"No run reached --loss {loss:g}: the lowest is {best_loss(lowest):.4f}, of {lowest.label}.")
    return loss


def _same_orders(rows: Sequence[Row]) -> bool:
    """Whether only runs of one seed are set against each other."""
    return all(run.seed == partner.seed for row in rows for run, partner in pairs(row, rows[0]))


def _step_ratio(row: Row, reference: Row) -> dict[str, Any] | None:
    if row.timing is None or reference.timing is None:
        return None
    return {"label": row.label, **asdict(row.timing.ratio(reference.timing))}


def _plain(value: Any) -> Any:
    """JSON has no nan or infinity: null in their place."""
    if isinstance(value, dict):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

"""A comparison as a whole: its figures as data, as text, and as the files of a folder."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sepllm_train.base.errors import UserError
from sepllm_train.base.figures import inline, svg
from sepllm_train.base.files import write_whole
from sepllm_train.base.statistics import CONFIDENCE
from sepllm_train.compare import plots, tables
from sepllm_train.compare.page import METHOD, SCORED, SEEDS, TIMED, page
from sepllm_train.compare.results import (
    BITS,
    Sweep,
    VariantAtTokens,
    VariantReach,
    at_equal_tokens,
    best_loss,
    common_loss,
    final_loss,
    find_sweep,
    mean,
    timed,
    to_reach,
)
from sepllm_train.compare.scores import CommonScores, find_scores, last_scores, scores_data
from sepllm_train.compare.tables import Table, several_seeds
from sepllm_train.compare.timing import Timing
from sepllm_train.compare.variants import Variant, caveats, pairing_notes, pairs, runs_of
from sepllm_train.compare.verdict import Findings, sweep_verdict, verdict
from sepllm_train.metrics.flops import CONVENTIONS
from sepllm_train.runs.records import CUMULATIVE, LOSS, SCORE, Record, Run

# Value of --loss for the reference's final validation loss, seed by seed.
REFERENCE = "reference"
# Characters of a line on the terminal.
CONSOLE = 120


@dataclass(frozen=True)
class Report:
    """A comparison of variants, the first of which is the reference.

    `loss` is the validation loss to reach (nats per token), None for the reference's final one, seed by seed.
    """

    variants: list[Variant]
    loss: float | None
    flops: str
    title: str
    reaches: list[VariantReach]
    equal: list[VariantAtTokens]
    verdict: str
    notes: list[str]
    timing: Timing | None
    sweep: Sweep | None = None
    scores: CommonScores = field(default_factory=lambda: CommonScores([], []))

    def main_tables(self) -> list[Table]:
        """Costs to reach the loss, of a sweep the losses by learning rate; and losses at equal tokens."""
        if self.sweep is not None:
            first = tables.by_learning_rate(self.sweep)
        else:
            first = tables.to_reach(self.variants, self.reaches, self.flops, self.target())
        scored = [last_scores(self.variants, self.scores)] if self.scores.found else []
        return [first, tables.at_equal_tokens(self.variants, self.equal, self.flops), *scored]

    def all_tables(self) -> list[Table]:
        """Every table that has a line."""
        more = [
            tables.step_times(self.variants),
            None if self.sweep else tables.seed_by_seed(self.variants, self.reaches, self.flops),
            tables.along_tokens(self.variants),
            tables.by_dataset(self.variants),
            tables.what_differs(self.variants),
        ]
        return self.main_tables() + [table for table in more if table is not None and table.rows]

    def target(self) -> str:
        """The loss to reach, in words."""
        return _target(self.variants, self.loss)

    def convention(self) -> str:
        """The convention by which FLOPs are counted."""
        return f"flops/{self.flops}: {CONVENTIONS[self.flops].words}"

    def method(self) -> list[str]:
        """Paragraphs on how the figures are made."""
        several, scored = several_seeds(self.variants), self.scores.found
        return [METHOD, *([SEEDS] if several else []), *([TIMED] if self.timing else []), *([SCORED] if scored else [])]

    def console(self) -> str:
        """Text for the terminal, at most CONSOLE characters wide."""
        shown = [table.text(CONSOLE) for table in self.main_tables()]
        prose = [_filled(text) for text in (self.convention(), *self.notes, self.verdict)]
        return "\n".join([*shown, prose[0], "", *prose[1:], ""])

    def markdown(self) -> str:
        """The whole comparison as Markdown."""
        head = [f"# {self.title}\n", f"{self.verdict}\n", *(f"- {note}\n" for note in self.notes)]
        body = [table.markdown() for table in self.all_tables()]
        return "\n".join([*head, *body, f"{self.convention()}\n", "\n\n".join(self.method())]) + "\n"

    def data(self) -> dict[str, Any]:
        """All figures as numbers, ready for JSON: null where there is none."""
        variants = [
            {
                "label": variant.label,
                "final_loss": mean(variant, final_loss),
                "runs": [
                    {
                        "name": run.label,
                        "seed": run.seed,
                        "status": run.info.get("status"),
                        "final_loss": final_loss(run),
                        "best_loss": best_loss(run),
                    }
                    for run in variant.runs
                ],
                "pairs": len(pairs(variant, self.variants[0])),
                "timing": None if variant.timing is None else variant.timing.data(),
            }
            for variant in self.variants
        ]
        steps = [_step_ratio(variant, self.variants[0]) for variant in self.variants]
        return _plain(
            {
                "title": self.title,
                "reference": self.variants[0].label,
                "loss": REFERENCE if self.loss is None else self.loss,
                "flops": self.flops,
                "confidence": CONFIDENCE,
                "corrected_for_rows": False,
                "verdict": self.verdict,
                "notes": self.notes,
                "seconds": "steps" if self.timing is None else "timed steps",
                "machine": None if self.timing is None else self.timing.machine,
                "rows": variants,
                "to_reach": [asdict(found) for found in self.reaches],
                "at_equal_tokens": [asdict(found) for found in self.equal],
                "step_seconds_ratio": steps,
                "learning_rates": None if self.sweep is None else self.sweep.data(),
                **({"scores": scores_data(self.variants, self.scores)} if self.scores.found else {}),
            }
        )

    def files(self) -> dict[str, bytes]:
        """Content of every file of the comparison, by name."""
        drawn = self._figures()
        drawings = {name: svg(figure) for name, _, figure in drawn}
        files = {f"{name}.svg": drawing.encode() for name, drawing in drawings.items()}
        inlined = [(title, inline(drawings[name], name)) for name, title, _ in drawn]
        files["curves.csv"] = curves_csv(self.variants).encode()
        files["comparison.json"] = (json.dumps(self.data(), indent=2, allow_nan=False) + "\n").encode()
        files["comparison.md"] = self.markdown().encode()
        files["comparison.html"] = page(
            self.title, self.verdict, self.notes, self.all_tables(), inlined, self.method(), self._legend()
        ).encode()
        return files

    def _figures(self) -> list[tuple[str, str, Figure]]:
        """(file name, title, figure) of every figure."""
        axes = plots.axes_of(self.flops, self.timing is not None)
        scores = [
            (
                f"score_{score.task}",
                f"{score.name} against FLOPs",
                plots.draw_scores(self.variants, axes[0], score.key, score.name),
            )
            for score in self.scores.drawn()
        ]
        if self.sweep is not None:
            curves = [(axis.file, axis.title, plots.draw_curves(self.variants, axis)) for axis in axes]
            return [
                ("loss_vs_learning_rate", "Loss against learning rate", plots.draw_sweep(self.sweep)),
                *curves,
                *scores,
            ]
        curves = [
            (axis.file, axis.title, plots.draw_curves(self.variants, axis, self.reaches, self.mean_loss()))
            for axis in axes
        ]
        if plots.has_intervals(self.reaches):
            ratios = plots.draw_ratios(self.variants, self.reaches, self.flops, self.target())
            curves.append(("ratios", "Ratios", ratios))
        return curves + scores

    def _legend(self) -> str:
        """Meaning of the lines in the figures."""
        several = several_seeds(self.variants)
        reached = (
            f"Dashed lines mark where each {'variant' if several else 'run'} first reached the loss of the first table."
        )
        hidden = "The first fifth of training may lie above the figures."
        return " ".join([*([plots.BAND] if several else []), *([] if self.sweep else [reached]), hidden])

    def mean_loss(self) -> float:
        """The loss to reach; the mean over the reference's runs of their final losses."""
        return mean(self.variants[0], final_loss) if self.loss is None else self.loss


def build_report(
    variants: Sequence[Variant],
    loss: float | str | None = None,
    flops: str = "model",
    title: str | None = None,
    timing: Timing | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """Compare variants from `read_variants`.

    `loss` in nats per token, or REFERENCE, defaults to the lowest that every run reached; a sweep of the learning rate
    is reported as one unless a number is given; `flops` is a key of
    CONVENTIONS; `notes` are sentences that a reader needs beside those found here. Raises UserError for a loss that no
    run reached and for a variant that `timing` does not hold.
    """
    variants = timed(variants, timing) if timing is not None else list(variants)
    runs = runs_of(variants)
    if isinstance(loss, str):
        if loss != REFERENCE:
            raise UserError(f"--loss {loss} must be a validation loss or '{REFERENCE}'.")
        target = None
    else:
        target = common_loss(runs) if loss is None else _reachable(loss, runs)
    reaches, equal = to_reach(variants, target), at_equal_tokens(variants)
    sweep = find_sweep(variants) if loss is None or target is None else None
    scores = find_scores(variants)
    words = _target(variants, target)
    sentences = [*notes, *pairing_notes(variants), *caveats(runs, _same_orders(variants), timing is not None)]
    sentences += scores.notes
    return Report(
        variants=variants,
        loss=target,
        flops=flops,
        title=title or f"Comparison of {', '.join(variant.label for variant in variants)}",
        reaches=reaches,
        equal=equal,
        verdict=sweep_verdict(sweep)
        if sweep is not None
        else verdict(Findings(variants, reaches, equal, words, words if target is not None else "that loss", flops)),
        notes=sentences + ([timing.words()] if timing is not None else []),
        timing=timing,
        sweep=sweep,
        scores=scores,
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


def curves_csv(variants: Sequence[Variant]) -> str:
    """All points of all curves: a line per record, empty where a record does not hold the column."""
    measured = [record for run in runs_of(variants) for record in run.validation + run.evaluation]
    names = {key for record in measured for key in record if key.startswith(("val/", SCORE))}
    columns = ["step", *CUMULATIVE, "train/loss", LOSS, BITS, *sorted(names - {LOSS, BITS})]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "run", "seed", *columns])
    for variant in variants:
        for run in variant.runs:
            records = {id(record): record for record in run.training + run.validation + run.evaluation}
            for record in sorted(records.values(), key=lambda record: (record["step"], _place(record))):
                values = (record.get(column, "") for column in columns)
                writer.writerow([variant.label, run.label, "" if run.seed is None else run.seed, *values])
    return text.getvalue()


def _place(record: Record) -> int:
    """Place of a record among those of its step: training, validation, evaluation."""
    return 1 if LOSS in record else 0 if "train/loss" in record else 2


def _target(variants: Sequence[Variant], loss: float | None) -> str:
    if loss is not None:
        return f"validation loss {loss:.4f}"
    reference = variants[0]
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


def _same_orders(variants: Sequence[Variant]) -> bool:
    """True if only runs of one seed are set against each other."""
    return all(run.seed == partner.seed for variant in variants for run, partner in pairs(variant, variants[0]))


def _step_ratio(variant: Variant, reference: Variant) -> dict[str, Any] | None:
    if variant.timing is None or reference.timing is None:
        return None
    return {"label": variant.label, **asdict(variant.timing.ratio(reference.timing))}


def _plain(value: Any) -> Any:
    """JSON has no nan or infinity: null in their place."""
    if isinstance(value, dict):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _filled(text: str) -> str:
    """Break a paragraph into lines of the terminal; paths stay whole."""
    return textwrap.fill(text, CONSOLE, break_long_words=False, break_on_hyphens=False)

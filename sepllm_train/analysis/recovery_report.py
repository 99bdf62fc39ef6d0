"""Tables and the picture of what `recovery` found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sepllm_train.analysis import plots
from sepllm_train.analysis.loss_report import shown, signed
from sepllm_train.base.console import quantity
from sepllm_train.base.statistics import Estimate
from sepllm_train.compare.tables import Table

READING = (
    "Losses in nats per token, of the same tokens throughout, ± one standard error over samples: differences are "
    "paired, and the error of a share is that of a ratio of sums over samples (delta method). Samples of one document "
    "are not independent, so the errors are low rather than high, and other seeds are not in them.\n\n"
    "dense: the source under its own pattern. before: its weights under the run's pattern. after: the run. gap = "
    "before - dense; left = after - dense; recovered = (before - after) / gap. A source whose learning rate has not "
    "come down improves by further training alone, and that counts as recovered: a dense run that goes on from it for "
    "as many steps (--continued) tells how much. No share is given when the gap is not above twice its error."
)
NONE = "no share"


def markdown(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    names = _names(result["runs"])
    tables = [_recovered(result, names), _continued(result, names), _windows(result, names), _lengths(result, names)]
    return "\n".join(
        [
            "# What post-training recovered\n",
            f"{result['samples']:,} held-out samples of {result['sequence_length']:,} tokens. {READING}\n",
            *(table.markdown() for table in tables if table is not None),
            *(f"{sentence}\n" for sentence in [*_without_share(result, names), *result["caveats"]]),
        ]
    )


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Recovered share by step of the runs that were validated on the same text as their source; none without one."""
    names = _names(result["runs"])
    curves: list[plots.Curve] = [
        (name, row["curve"]["steps"], row["curve"]["recovered"], {"colour": number})
        for number, (name, row) in enumerate(zip(names, result["runs"], strict=True))
        if row["curve"] is not None
    ]
    if not curves:
        return {}
    title = "Recovered share of the gap, by the validations of training"
    return {"recovered_by_step": plots.lines(title, curves, "steps of post-training", "recovered share", level=1.0)}


def _names(rows: list[dict[str, Any]]) -> list[str]:
    """Names of the runs, with their folders where they are not told apart otherwise."""
    names = [Path(row["run"]).resolve().name for row in rows]
    return [name if names.count(name) == 1 else f"{name} ({row['run']})" for name, row in zip(names, rows, strict=True)]


def _recovered(result: dict[str, Any], names: list[str]) -> Table:
    rows = [[name, _pattern(row["attention"]), *_figures(row)] for name, row in zip(names, result["runs"], strict=True)]
    return Table("Recovered", ["run", "pattern", "dense", "before", "gap", "after", "left", "recovered"], rows)


def _continued(result: dict[str, Any], names: list[str]) -> Table | None:
    if result["continued"] is None:
        return None
    rows = [
        [name, shown(row["continued"]), signed(row["left_of_continued"]), _share(row["recovered_of_continued"])]
        for name, row in zip(names, result["runs"], strict=True)
    ]
    title = f"Beside {Path(result['continued']['run']).resolve().name}, the source trained on for as many tokens"
    header = ["run", "continued", "after - continued", "(before - after) / (before - continued)"]
    return Table(title, header, rows)


def _windows(result: dict[str, Any], names: list[str]) -> Table | None:
    rows = [
        [f"{name}, n = {entry['window']}", *_figures(entry)]
        for name, row in zip(names, result["runs"], strict=True)
        for entry in row["windows"]
    ]
    header = ["run", "dense", "before", "gap", "after", "left", "recovered"]
    return Table("The same weights with other windows", header, rows) if rows else None


def _lengths(result: dict[str, Any], names: list[str]) -> Table:
    rows = []
    for name, row in zip(names, result["runs"], strict=True):
        source, optim = row["source"], row["optim"]
        schedule = f"from {optim['schedule_start']:,}" if optim["schedule_start"] else "anew"
        rows.append(
            [
                name,
                "-" if row["source_steps"] is None else f"{row['source_steps']:,}",
                quantity(source["tokens"]) if source["tokens"] else "-",
                f"{row['step']:,}",
                quantity(row["tokens"]),
                *("-" if row[key] is None else f"{row[key]:.1%}" for key in ("steps_share", "tokens_share")),
                f"{optim['lr']:g}",
                schedule,
            ]
        )
    header = ["run", "source's steps", "its tokens", "steps", "tokens", "of its steps", "of its tokens", "lr"]
    return Table("Length of training", [*header, "schedule"], rows)


def _figures(row: dict[str, Any]) -> list[str]:
    """Cells of the losses and what follows from them."""
    losses = [shown(row["dense"]), shown(row["before"]), signed(row["gap"]), shown(row["after"]), signed(row["left"])]
    return [*losses, _share(row["recovered"])]


def _share(estimate: Estimate | None) -> str:
    return NONE if estimate is None else f"{estimate.mean:.1%} ± {estimate.error:.1%}"


def _pattern(attention: dict[str, Any]) -> str:
    return (
        attention["pattern"]
        if attention["pattern"] == "dense"
        else f"{attention['pattern']}, n = {attention['window']}"
    )


def _without_share(result: dict[str, Any], names: list[str]) -> list[str]:
    """A sentence for each run of which no share can be given."""
    sentences = []
    for name, row in zip(names, result["runs"], strict=True):
        if row["recovered"] is None:
            sentences.append(
                f"{name}: no share can be given, its gap of {signed(row['gap'])} is not above 0 by more than twice its "
                f"error on {result['samples']:,} samples."
            )
    return sentences

"""Tables and pictures of what `losses` found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from sepllm_train.analysis import plots
from sepllm_train.base.statistics import Estimate
from sepllm_train.compare.tables import Table

READING = (
    "Losses in nats per token on held-out documents, ± one standard error over samples; differences are paired, of the "
    "same tokens. Samples of one document are not independent, so the errors are low rather than high. The weights are "
    "those of training throughout: a loss that rises under another pattern says that this model used what was taken "
    "away, not what a model trained under that pattern would reach. This is one model of one seed."
)


def markdown(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    checkpoint = result["checkpoint"]
    tables = [_patterns(result), _far_recall(result), _classes(result), _sweep(result), _positions(result)]
    return "\n".join(
        [
            f"# Loss of {result['run']} under other patterns\n",
            f"Step {checkpoint['step']:,} ({checkpoint['tokens']:,} tokens), {result['samples']:,} samples of "
            f"{result['sequence_length']:,} tokens. {READING}\n",
            *(table.markdown() for table in tables if table is not None),
            *(f"{sentence}\n" for sentence in _sentences(result)),
        ]
    )


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Pictures of the parts that there are, by file name."""
    found = {"loss_by_position": _position_figure(result)}
    classes = result["classes"]
    if classes:
        names = [row["class"] for row in classes]
        found["loss_without_class"] = plots.bars(
            "Loss without a class of separators",
            names,
            {"change": [row["change"].mean for row in classes]},
            "change in loss (nats per token)",
            {"change": [row["change"].error for row in classes]},
        )
        rows = [row for row in classes if row["per_thousand_pairs"] is not None]
        found["loss_per_removed_pair"] = plots.bars(
            "Change in loss for each thousand pairs removed",
            [row["class"] for row in rows],
            {"change": [row["per_thousand_pairs"].mean for row in rows]},
            "nats per thousand (query, key) pairs",
            {"change": [row["per_thousand_pairs"].error for row in rows]},
        )
    if result["sweep"]:
        found["loss_vs_pairs"] = _sweep_figure(result["sweep"])
    if result["far_recall"]:
        found["far_recall"] = _far_figure(result["far_recall"])
    return found


def _patterns(result: dict[str, Any]) -> Table:
    rows = [
        [row["pattern"], shown(row["loss"]), signed(row["change"]), f"{row['attended_share']:.1%}"]
        for row in result["patterns"]
    ]
    return Table("Patterns", ["pattern", "loss", "change", "attended"], rows)


def _far_recall(result: dict[str, Any]) -> Table | None:
    rows = [
        [f"{row['pattern']}: {row['tokens']}", f"{row['share']:.1%}", shown(row["loss"]), signed(row["change"])]
        for row in result["far_recall"]
    ]
    title = f"Far-recall tokens (last occurrence of the bigram more than {result['window']} tokens back)"
    return Table(title, ["pattern and tokens", "share of tokens", "loss", "change"], rows) if rows else None


def _classes(result: dict[str, Any]) -> Table | None:
    rows = [
        [
            row["class"],
            signed(row["change"]),
            f"{row['attended_share_lost']:.2%}",
            f"{row['removed_pairs_per_token']:.2f}",
            "-" if row["per_thousand_pairs"] is None else signed(row["per_thousand_pairs"]),
            *([signed(row["far_recall_change"])] if "far_recall_change" in row else []),
        ]
        for row in result["classes"]
    ]
    header = ["class", "change in loss", "attended share lost", "pairs removed per token", "change per 1,000 pairs"]
    header += ["change, far recall"] if result["far_recall"] else []
    return Table("One class of separators dropped from the base pattern", header, rows) if rows else None


def _sweep(result: dict[str, Any]) -> Table | None:
    rows = []
    for row in result["sweep"]:
        line = [
            f"S={row['length']:,} n={row['window']}",
            f"{row['pairs_per_token']:,.0f}",
            f"{row['attended_share']:.1%}",
        ]
        line += [shown(row["loss"]), signed(row["change"])]
        equal = "equal_loss" in row
        line += (
            [str(row["equal_window"]), shown(row["equal_loss"]), signed(row["separators_gain"])] if equal else ["-"] * 3
        )
        far = "far_recall_separators_gain" in row
        line += [signed(row["far_recall_separators_gain"]) if far else "-"] if result["far_recall"] else []
        rows.append(line)
    header = ["length, window", "pairs/token", "attended", "loss", "change from trained"]
    header += ["n without separators", "loss without", "without - with"]
    header += ["without - with, far recall"] if result["far_recall"] else []
    title = "Windows and lengths, with separators and without them at equal attended pairs"
    return Table(title, header, rows) if rows else None


def _positions(result: dict[str, Any]) -> Table:
    rows = [
        [f"{row['first']:,}-{row['last']:,}", shown(row["trained"])]
        + ([shown(row["base"])] if result["trained_differs"] else [])
        for row in result["positions"]
    ]
    header = ["position", "as trained", *(["base"] if result["trained_differs"] else [])]
    return Table("Loss by position in the sequence", header, rows)


def _sentences(result: dict[str, Any]) -> list[str]:
    """What the numbers say, and what they leave open."""
    sentences = []
    single = [row for row in result["classes"] if row["class"] != "all of them"]
    if single:
        clear = [row for row in single if clear_of_zero(row["change"])]
        groups = {
            "Without this class the loss is higher by more than two standard errors": [
                row for row in clear if row["change"].mean > 0
            ],
            "Lower by more than two": [row for row in clear if row["change"].mean < 0],
            "Within two standard errors of no change": [row for row in single if row not in clear],
        }
        sentences += [f"{words}: {', '.join(row['class'] for row in rows)}." for words, rows in groups.items() if rows]
    gains = [row for row in result["sweep"] if "separators_gain" in row]
    if gains:
        better = [row for row in gains if row["separators_gain"].mean > 0 and clear_of_zero(row["separators_gain"])]
        worse = [row for row in gains if row["separators_gain"].mean < 0 and clear_of_zero(row["separators_gain"])]
        sentences.append(
            f"At equal attended pairs separators beat neighbours by more than two standard errors in {len(better)} of "
            f"{len(gains)} settings, and lose by more than two in {len(worse)}; no correction is made for their number."
        )
    lengths = [row["length"] for row in result["sweep"]]
    if lengths and max(lengths) > result["sequence_length"]:
        sentences.append(
            f"The model was trained on sequences of {result['sequence_length']:,} tokens: at longer ones its positions "
            "are new to it, which raises the loss whatever the pattern."
        )
    return sentences


def _position_figure(result: dict[str, Any]) -> Figure:
    rows = result["positions"]
    x = [(row["first"] + row["last"] + 1) / 2 for row in rows]
    names = {"trained": "as trained", **({"base": "base"} if result["trained_differs"] else {})}
    curves = [
        (label, x, [row[key].mean for row in rows], {"error": [row[key].error for row in rows]})
        for key, label in names.items()
    ]
    return plots.lines(
        "Loss by position in the sequence", curves, "position (middle of a bucket)", "loss (nats per token)", log_x=True
    )


def _sweep_figure(sweep: Sequence[dict[str, Any]]) -> Figure:
    curves: list[plots.Curve] = []
    for number, length in enumerate(dict.fromkeys(row["length"] for row in sweep)):
        rows = [row for row in sweep if row["length"] == length]
        bare = [row for row in rows if "equal_loss" in row]
        x, y = [row["pairs_per_token"] for row in rows], [row["loss"].mean for row in rows]
        curves.append((f"S={length:,}, with separators", x, y, {"colour": number}))
        if bare:
            x, y = [row["equal_keys"] for row in bare], [row["equal_loss"].mean for row in bare]
            curves.append((f"S={length:,}, without", x, y, {"colour": number, "dashed": True}))
    return plots.lines(
        "Loss at equal attended pairs", curves, "pairs per token, all layers", "loss (nats per token)", log_x=True
    )


def _far_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    groups = list(dict.fromkeys(row["tokens"] for row in rows))
    table = {(row["pattern"], row["tokens"]): row["loss"] for row in rows}
    return plots.bars(
        "Loss of far-recall tokens and of others",
        groups,
        {name: [table[name, group].mean for group in groups] for name in patterns},
        "loss (nats per token)",
        {name: [table[name, group].error for group in groups] for name in patterns},
    )


def clear_of_zero(estimate: Estimate) -> bool:
    """Whether a difference is more than two standard errors from zero."""
    return not math.isnan(estimate.error) and abs(estimate.mean) > 2 * estimate.error


def shown(estimate: Estimate) -> str:
    """A loss with its standard error."""
    return f"{estimate.mean:.4f} ± {estimate.error:.4f}" if not math.isnan(estimate.error) else f"{estimate.mean:.4f}"


def signed(estimate: Estimate) -> str:
    """A difference with its standard error."""
    return f"{estimate.mean:+.4f} ± {estimate.error:.4f}" if not math.isnan(estimate.error) else f"{estimate.mean:+.4f}"

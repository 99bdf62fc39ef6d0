"""Tables and pictures of what `ablation` found."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sepllm_train.analysis.loss_report import READING, clear_of_zero, shown, signed
from sepllm_train.base.figures import COLOURS, INK, MARKERS, dressed, legend_below, picture
from sepllm_train.compare.tables import Table

SERIES = {
    "subset": "separators",
    "fixed": "every D-th token",
    "streaming": "neighbours alone",
    "random": "tokens at random",
}


def markdown(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    checkpoint = result["checkpoint"]
    return "\n".join(
        [
            f"# {result['run']} with some of the separators\n",
            f"Step {checkpoint['step']:,} ({checkpoint['tokens']:,} tokens), {result['samples']:,} samples of "
            f"{result['sequence_length']:,} tokens; n = {result['window']} where no other is named, "
            f"{result['initial_tokens']} initial tokens. Changes are from the model's own pattern. Far recall: tokens "
            f"whose bigram occurred last more than {result['recall_window']} tokens back "
            f"({result['far_recall_share']:.1%} of all). {READING}\n",
            *(table.markdown() for table in (*_tables(result), _equal(result))),
            *(f"{sentence}\n" for sentence in _sentences(result)),
        ]
    )


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Change in loss against the keys kept: of all tokens, and of far-recall ones where there are some."""
    found = {"ablation": _figure(result, "change", "Loss against keys kept")}
    if _far(result):
        found["ablation_far_recall"] = _figure(
            result, "far_recall_change", "Loss of far-recall tokens against keys kept"
        )
    return found


def _far(result: dict[str, Any]) -> bool:
    return result["far_recall_share"] > 0


def _tables(result: dict[str, Any]) -> list[Table]:
    """What each pattern keeps and loses, one table for patterns with separators and two for those at equal KV kept."""
    groups: dict[str, list[dict[str, Any]]] = {"Patterns": [], "Evenly spaced tokens": [], "Neighbours alone": []}
    for row in result["rows"]:
        alone = "Neighbours alone" if row["matches"] else "Patterns"
        groups[{"fixed": "Evenly spaced tokens", "streaming": alone}.get(row["series"], "Patterns")].append(row)
    header = ["pattern", "density", "KV kept", "KV kept, all tokens", "attended", "loss", "change"]
    header += ["loss, far recall", "change, far recall"] if _far(result) else []
    return [Table(title, header, [_row(row, result) for row in rows]) for title, rows in groups.items() if rows]


def _row(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    shares = [f"{row[key]:.2%}" for key in ("kv_kept", "kv_kept_mean", "attended_share")]
    far = [shown(row["far_recall_loss"]), signed(row["far_recall_change"])] if _far(result) else []
    density = "-" if row["density"] is None else f"{row['density']:.2%}"
    return [row["name"], density, *shares, shown(row["loss"]), signed(row["change"]), *far]


def _equal(result: dict[str, Any]) -> Table:
    rows = []
    for row in result["equal"]:
        line = [row["subset"], f"{row['kv_kept']:.2%}"]
        for key in ("interval", "window"):
            line += [f"{row[key]}", f"{row[f'{key}_kv_kept']:.2%}", signed(row[f"{key}_gain"])]
            line += [signed(row[f"{key}_far_recall_gain"])] if _far(result) else []
        rows.append(line)
    header = ["separators", "KV kept"]
    for name in ("D", "n"):
        header += [name, f"KV kept, {name}", f"loss with {name} - with separators"]
        header += ["the same, far recall"] if _far(result) else []
    return Table("Evenly spaced tokens and neighbours alone at the KV kept of each subset", header, rows)


def _sentences(result: dict[str, Any]) -> list[str]:
    """What the numbers say, and how they were counted."""
    sentences = [
        "KV kept is the share of the keys so far that the last token of a sequence sees, the mean over layers and "
        "samples; over all tokens it is the mean of each token's own share. Attended are the pairs over those of the "
        "causal triangle. D and n are those whose KV kept at the last token is nearest on these samples."
    ]
    for key, words in (("interval", "evenly spaced tokens"), ("window", "neighbours alone")):
        gains = [row[f"{key}_gain"] for row in result["equal"]]
        clear = [gain.mean for gain in gains if clear_of_zero(gain)]
        sentences.append(
            f"Separators beat {words} by more than two standard errors in {sum(mean > 0 for mean in clear)} of "
            f"{len(gains)} subsets, and lose by more than two in {sum(mean < 0 for mean in clear)}; no correction is "
            "made for their number."
        )
    random = next((row for row in result["rows"] if row["series"] == "random"), None)
    if random is not None:
        nine = next(row for row in result["equal"] if row["subset"] == "nine")
        far = f"; of far-recall tokens {signed(nine['random_far_recall_gain'])}" if _far(result) else ""
        sentences.append(
            f"Tokens at random: each is special with probability {random['density']:.4f}, the density of the nine, "
            "drawn by the seed of the run, the number of the sample and the position, so that nothing of the text "
            f"decides. Loss with them - with the nine: {signed(nine['random_gain'])}{far}."
        )
    return sentences


def _figure(result: dict[str, Any], key: str, title: str) -> Figure:
    def draw(figure: Figure) -> None:
        plot = dressed(
            figure.add_subplot(), title, "KV kept at the last token (percent)", "change in loss (nats per token)"
        )
        for number, (series, label) in enumerate(SERIES.items()):
            rows = sorted((row for row in result["rows"] if row["series"] == series), key=lambda row: row["kv_kept"])
            if not rows:
                continue
            plot.errorbar(
                [100 * row["kv_kept"] for row in rows],
                [row[key].mean for row in rows],
                yerr=[row[key].error for row in rows],
                color=COLOURS[number],
                # Subsets are no points of one curve.
                linestyle="-" if series in ("fixed", "streaming") else "none",
                linewidth=1.2,
                elinewidth=0.8,
                marker=MARKERS[number],
                markersize=5,
                label=label,
            )
        plot.axhline(0, color=INK, linewidth=0.8)
        _name_subsets(plot, [row for row in result["rows"] if row["series"] == "subset"], key)
        legend_below(figure)

    return picture((7.6, 5.2), draw)


def _name_subsets(plot: Axes, rows: list[dict[str, Any]], key: str) -> None:
    """Write the names of subsets beside their points, but for those that would lie on an earlier one's."""
    (left, right), (low, high) = plot.get_xlim(), plot.get_ylim()
    named: list[tuple[float, float]] = []
    for row in rows:
        x, y = 100 * row["kv_kept"], row[key].mean
        if all(abs(x - a) > 0.13 * (right - left) or abs(y - b) > 0.035 * (high - low) for a, b in named):
            plot.annotate(row["name"], (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8, color=INK)
            named.append((x, y))

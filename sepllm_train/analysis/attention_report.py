"""Tables and pictures of what `attention` found."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sepllm_train.analysis import plots
from sepllm_train.compare.tables import Table

READING = (
    "Mass is the probability that a query gives to such keys, a mean over queries, heads, layers and samples. Even is "
    "what it would be if each query spread itself evenly over the keys it sees, and lift the ratio of the two: the "
    "mean attention of one such key relative to an even one. Near is within the window, far beyond it; the query's own "
    "token is a group of its own, and in no figure of a class. Attention is not contribution: what a key adds depends "
    "on its value and on later layers. This is one model of one seed."
)


def markdown(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    checkpoint = result["checkpoint"]
    return "\n".join(
        [
            f"# Attention of {result['run']}\n",
            f"Step {checkpoint['step']:,} ({checkpoint['tokens']:,} tokens), {result['samples']:,} samples of "
            f"{result['sequence_length']:,} tokens; {result['initial']} initial tokens, n = {result['window']}, "
            f"separators {', '.join(result['separators_chosen'])}. {READING}\n",
            *(table.markdown() for table in (_groups(result), _layers(result), _classes(result), _distances(result))),
            _sentence(result) + "\n",
        ]
    )


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Pictures by file name."""
    layers = [f"layer {number}" for number in result["layers"]]
    heads = [f"head {number}" for number in result["heads"]]
    parts = {name: [row[name]["mass"].mean for row in result["layer_groups"]] for name in result["layer_groups"][0]}
    classes = [row for row in result["classes"] if row["lift"] is not None]
    found = {
        "attention_by_layer": plots.stacked(
            "Where attention goes", layers, parts, "share of a query's attention, mean over heads"
        ),
        "separator_mass": plots.heatmap(
            "Attention on separators", np.array(result["head_mass"]), layers, heads, "share of a query's attention"
        ),
        "separator_lift": plots.heatmap(
            "Attention on one separator",
            np.array(result["head_lift"]),
            layers,
            heads,
            "lift (1 = even attention)",
        ),
        "attention_by_distance": _distance_figure(result["distances"]),
    }
    if classes:
        found["attention_by_class"] = plots.bars(
            "Attention on one separator of a class, relative to even attention",
            [row["class"] for row in classes],
            {
                "any distance": [row["lift"] for row in classes],
                "beyond the window": [row["far_lift"] or 0.0 for row in classes],
            },
            "lift (1 = even)",
        )
    return found


def _figures(pair: dict[str, Any]) -> list[str]:
    mass = pair["mass"]
    return [f"{mass.mean:.2%} ± {mass.error:.2%}", f"{pair['uniform']:.2%}", _lift(pair["lift"])]


def _lift(lift: float | None) -> str:
    return "-" if lift is None else f"{lift:.2f}"


def _groups(result: dict[str, Any]) -> Table:
    rows = [[name, *_figures(pair)] for name, pair in result["groups"].items()]
    rows.append(["separators, near and far", *_figures(result["separators"])])
    if result["sink"]:
        rows.append(["learned sink", f"{result['sink']:.2%}", "-", "-"])
    return Table("Where attention goes", ["keys", "mass", "even", "lift"], rows)


def _layers(result: dict[str, Any]) -> Table:
    names = list(result["layer_groups"][0])
    rows = [
        [f"layer {number}", *(f"{row[name]['mass'].mean:.1%} ({_lift(row[name]['lift'])})" for name in names)]
        for number, row in zip(result["layers"], result["layer_groups"], strict=True)
    ]
    return Table("Mass by layer (lift)", ["layer", *names], rows)


def _classes(result: dict[str, Any]) -> Table:
    rows = []
    for row in result["classes"]:
        mark = "" if row["class"] in result["separators_chosen"] else " (not chosen)"
        far = [f"{row['far_mass'].mean:.2%}", _lift(row["far_lift"])]
        rows.append([f"{row['class']}{mark}", f"{row['share']:.2%}", *_figures(row), *far])
    header = ["class", "share of tokens", "mass", "even", "lift", "mass, far", "lift, far"]
    return Table("By class of separator", header, rows)


def _distances(result: dict[str, Any]) -> Table:
    rows = [
        [f"{row['first']:,}-{row['last']:,}" if row["last"] > row["first"] else f"{row['first']:,}"]
        + [f"{row[name]['mass'].mean:.2%} ({_lift(row[name]['lift'])})" for name in ("separators", "initial", "others")]
        for row in result["distances"]
    ]
    return Table("Mass by distance (lift)", ["distance", "separators", "initial", "others"], rows)


def _sentence(result: dict[str, Any]) -> str:
    """What the numbers say of separators."""
    pair, far, others = result["separators"], result["groups"]["separators far"], result["groups"]["others near"]
    text = (
        f"Separators receive {pair['mass'].mean:.1%} of the attention; even attention would give {pair['uniform']:.1%}."
    )
    if far["lift"] is not None and others["lift"] is not None:
        text += (
            f" Relative to even attention, one beyond the window receives {far['lift']:.2f}, and another token within "
            f"it {others['lift']:.2f}."
        )
    return text


def _distance_figure(rows: list[dict[str, Any]]) -> Figure:
    curves: list[plots.Curve] = []
    for name in ("separators", "others"):
        seen = [row for row in rows if row[name]["lift"] is not None and row["first"] > 0]
        x = [(row["first"] + row["last"]) / 2 for row in seen]
        curves.append((name, x, [row[name]["lift"] for row in seen], {}))
    return plots.lines(
        "Attention on one key by its distance",
        curves,
        "distance in tokens (middle of a range)",
        "lift (1 = even attention)",
        log_x=True,
        level=1.0,
    )

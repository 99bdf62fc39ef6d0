"""The attention command: what separators, initial tokens and neighbours receive in a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from data_prep.separators import PAPER, class_numbers
from sepllm_train.analysis import plots
from sepllm_train.analysis.mass import INITIAL, KINDS, Mass, attention_mass
from sepllm_train.analysis.output import check_output, progress, write_report
from sepllm_train.base.statistics import token_mean
from sepllm_train.compare.tables import Table
from sepllm_train.config.schema import require
from sepllm_train.distributed.launch import alone
from sepllm_train.runs.evaluate import usual_window
from sepllm_train.runs.open import TrainedRun
from sepllm_train.runs.variations import CLASS_NAMES, classes_of

GROUPS = ("itself", "initial", "separators near", "separators far", "others near", "others far")
READING = (
    "Mass is the probability that a query gives to such keys, a mean over queries, heads, layers and samples. Even is "
    "what it would be if each query spread itself evenly over the keys it sees, and lift the ratio of the two: the "
    "mean attention of one such key relative to an even one. Near is within the window, far beyond it; the query's own "
    "token is a group of its own, and in no figure of a class. Attention is not contribution: what a key adds depends "
    "on its value and on later layers. This is one model of one seed."
)


@dataclass(frozen=True)
class MassOptions:
    """Kinds of keys, None for the run's own (the paper's where it has none), and layers and heads, None for all.

    `classes`: a selection as `class_numbers` takes; `window` and `initial` in tokens; `layers`, `heads` from 0.
    """

    classes: str | None = None
    window: int | None = None
    initial: int | None = None
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None

    def check(self) -> None:
        """Raise UserError for what is wrong whatever the run."""
        require(self.window is None or self.window >= 1, f"--window {self.window} must be at least 1.")
        require(self.initial is None or self.initial >= 0, f"--initial {self.initial} must be 0 or more.")
        if self.classes is not None:
            class_numbers(self.classes)


def attention_command(
    run: TrainedRun, output: Path, options: MassOptions, samples: int | None = None
) -> dict[str, Any]:
    """Measure the attention of a run's checkpoint, write the report to `output` and return the result.

    samples: as in `TrainedRun.sample_count`. Raises UserError for a mistake, before anything is written.
    """
    check_output(output)
    options.check()
    with alone():
        result = measure(run, run.sample_count(samples), options)
    write_report(output, "attention", result, markdown(result), figures(result))
    return result


def measure(run: TrainedRun, samples: int, options: MassOptions) -> dict[str, Any]:
    """The attention of a run's model on its first `samples` held-out samples. Raises UserError for a layer or head
    that it does not have."""
    model, own = run.config.model, classes_of(run.pattern)
    window = options.window or usual_window(run.pattern)
    initial = options.initial
    if initial is None:
        initial = 3 if run.config.attention.pattern == "dense" else run.pattern.initial_tokens
    separators = list(class_numbers(options.classes)) if options.classes else own or list(PAPER)
    layers = _chosen("layers", options.layers, model.layers)
    heads = _chosen("heads", options.heads, model.heads)
    trained, validation = run.model, run.validation
    with progress(samples, "sequence") as bar:
        mass = attention_mass(
            trained,
            run.pattern,
            validation,
            samples,
            window=window,
            initial=initial,
            layers=layers,
            heads=heads,
            advance=lambda: bar.update(),
        )
    settings = {
        "window": window,
        "initial": initial,
        "separators_chosen": [CLASS_NAMES[number] for number in separators],
    }
    return {**run.describe(samples), **settings, "layers": layers, "heads": heads, **summary(mass, separators, window)}


def _chosen(what: str, asked: Sequence[int] | None, there: int) -> list[int]:
    wrong = [number for number in asked or () if not 0 <= number < there]
    require(not wrong, f"--{what} {wrong[0] if wrong else ''}: this model has {what} 0 to {there - 1}.")
    return sorted(set(asked)) if asked else list(range(there))


def group_masks(separators: Sequence[int], edges: Sequence[int], window: int) -> dict[str, Tensor]:
    """Kinds and ranges that make up each of GROUPS: bool [K, E]; each kind and range is in exactly one.

    itself: the query's own token, unless it is initial. initial: the initial tokens, at any distance. The others by
    whether their class is among `separators`, near at a distance below `window` and far from there on.
    """
    separating = torch.zeros(KINDS, 1, dtype=torch.bool)
    separating[list(separators)] = True
    first = torch.zeros(KINDS, 1, dtype=torch.bool)
    first[INITIAL] = True
    distance = torch.tensor(edges[:-1])[None]
    same, near = distance == 0, (distance > 0) & (distance < window)
    far = distance >= max(window, 1)
    return {
        "itself": ~first & same,
        "initial": first.expand(-1, len(edges) - 1),
        "separators near": separating & near,
        "separators far": separating & far,
        "others near": ~separating & ~first & near,
        "others far": ~separating & ~first & far,
    }


def summary(mass: Mass, separators: Sequence[int], window: int) -> dict[str, Any]:
    """Figures of a Mass: by group, layer and head, by class of separator, by distance.

    Everywhere `mass` is the probability that a query gives to such keys, a mean over queries, heads, layers and
    samples unless said otherwise; `uniform` is the same for a query that spreads itself evenly over the keys it sees;
    `lift` is mass / uniform, the mean attention of such a key relative to an even one (1 for even attention). A lift is
    null where no query sees such a key.
    """
    masks = group_masks(separators, mass.edges, window)
    every = mass.mass.mean((1, 2))  # [N, K, E]
    even = mass.uniform.mean(1)
    groups = {}
    for name, mask in masks.items():
        groups[name] = _pair(every[:, mask].sum(-1), even[:, mask].sum(-1))
    both = masks["separators near"] | masks["separators far"]
    by_head = (mass.mass * both).sum((-1, -2)).mean(0)
    by_layer = (mass.uniform * both).sum((-1, -2)).mean(0)
    return {
        "groups": groups,
        "separators": _pair(every[:, both].sum(-1), even[:, both].sum(-1)),
        "sink": float(mass.sink.mean()),
        "layer_groups": [
            {
                name: _pair(
                    (mass.mass[:, place] * mask).sum((-1, -2)).mean(1), (mass.uniform[:, place] * mask).sum((-1, -2))
                )
                for name, mask in masks.items()
            }
            for place in range(len(mass.layers))
        ],
        "head_mass": by_head.tolist(),
        "head_lift": (by_head / by_layer[:, None]).tolist(),
        "classes": [
            _class(mass, every, even, number, window) for number in CLASS_NAMES if mass.shares[:, number].any()
        ],
        "distances": _distances(mass, every, even, separators),
    }


def _pair(mass: Tensor, uniform: Tensor) -> dict[str, Any]:
    """Mass and uniform of one group from those of each sample [N], and their ratio."""
    expected = float(uniform.mean())
    return {
        "mass": token_mean(mass[:, None]),
        "uniform": expected,
        "lift": float(mass.mean()) / expected if expected else None,
    }


def _class(mass: Mass, every: Tensor, even: Tensor, number: int, window: int) -> dict[str, Any]:
    """One class of separators, the query's own token left out: in all, and from the window on."""
    distance = torch.tensor(mass.edges[:-1])
    ranges = {"": distance > 0, "far_": distance >= max(window, 1)}
    row: dict[str, Any] = {"class": CLASS_NAMES[number], "share": float(mass.shares[:, number].mean())}
    for name, chosen in ranges.items():
        found = _pair(every[:, number, chosen].sum(-1), even[:, number, chosen].sum(-1))
        row |= {f"{name}{key}": value for key, value in found.items()}
    return row


def _distances(mass: Mass, every: Tensor, even: Tensor, separators: Sequence[int]) -> list[dict[str, Any]]:
    """By distance range: separators, initial tokens and others."""
    others = [kind for kind in range(KINDS) if kind not in separators and kind != INITIAL]
    rows = []
    for place, (first, end) in enumerate(zip(mass.edges[:-1], mass.edges[1:], strict=True)):
        row: dict[str, Any] = {"first": first, "last": end - 1}
        for name, kinds in (("separators", list(separators)), ("initial", [INITIAL]), ("others", others)):
            row[name] = _pair(every[:, kinds, place].sum(-1), even[:, kinds, place].sum(-1))
        rows.append(row)
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    checkpoint = result["checkpoint"]
    return "\n".join(
        [
            f"# Attention of {result['run']}\n",
            f"Step {checkpoint['step']:,} ({checkpoint['tokens']:,} tokens), {result['samples']:,} samples of "
            f"{result['sequence_length']:,} tokens; {result['initial']} initial tokens, n = {result['window']}, "
            f"separators {', '.join(result['separators_chosen'])}. {READING}\n",
            *(
                table.markdown()
                for table in (
                    _groups_table(result),
                    _layers_table(result),
                    _classes_table(result),
                    _distances_table(result),
                )
            ),
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


def _cells(pair: dict[str, Any]) -> list[str]:
    mass = pair["mass"]
    return [f"{mass.mean:.2%} ± {mass.error:.2%}", f"{pair['uniform']:.2%}", _lift(pair["lift"])]


def _lift(lift: float | None) -> str:
    return "-" if lift is None else f"{lift:.2f}"


def _groups_table(result: dict[str, Any]) -> Table:
    rows = [[name, *_cells(pair)] for name, pair in result["groups"].items()]
    rows.append(["separators, near and far", *_cells(result["separators"])])
    if result["sink"]:
        rows.append(["learned sink", f"{result['sink']:.2%}", "-", "-"])
    return Table("Where attention goes", ["keys", "mass", "even", "lift"], rows)


def _layers_table(result: dict[str, Any]) -> Table:
    names = list(result["layer_groups"][0])
    rows = [
        [f"layer {number}", *(f"{row[name]['mass'].mean:.1%} ({_lift(row[name]['lift'])})" for name in names)]
        for number, row in zip(result["layers"], result["layer_groups"], strict=True)
    ]
    return Table("Mass by layer (lift)", ["layer", *names], rows)


def _classes_table(result: dict[str, Any]) -> Table:
    rows = []
    for row in result["classes"]:
        mark = "" if row["class"] in result["separators_chosen"] else " (not chosen)"
        far = [f"{row['far_mass'].mean:.2%}", _lift(row["far_lift"])]
        rows.append([f"{row['class']}{mark}", f"{row['share']:.2%}", *_cells(row), *far])
    header = ["class", "share of tokens", "mass", "even", "lift", "mass, far", "lift, far"]
    return Table("By class of separator", header, rows)


def _distances_table(result: dict[str, Any]) -> Table:
    rows = [
        [f"{row['first']:,}-{row['last']:,}" if row["last"] > row["first"] else f"{row['first']:,}"]
        + [f"{row[name]['mass'].mean:.2%} ({_lift(row[name]['lift'])})" for name in ("separators", "initial", "others")]
        for row in result["distances"]
    ]
    return Table("Mass by distance (lift)", ["distance", "separators", "initial", "others"], rows)


def _sentence(result: dict[str, Any]) -> str:
    """Conclusion about separators."""
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

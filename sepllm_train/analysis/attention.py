"""The attention command: what separators, initial tokens and neighbours receive in a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.separators import PAPER, class_numbers
from sepllm_train.analysis import attention_report
from sepllm_train.analysis.mass import INITIAL, KINDS, Mass, attention_mass
from sepllm_train.analysis.report import check_output, progress, write_report
from sepllm_train.base.statistics import token_mean
from sepllm_train.config.schema import require
from sepllm_train.runs.evaluate import AnalysisSource, usual_window
from sepllm_train.runs.folder import Run, alone, describe
from sepllm_train.runs.variations import CLASS_NAMES, classes_of

GROUPS = ("itself", "initial", "separators near", "separators far", "others near", "others far")


@dataclass(frozen=True)
class MassOptions:
    """Groups of keys (None: the run's own, the paper's where it has none), layers and heads to look at (None: all).

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


def attention_command(source: AnalysisSource, output: Path, options: MassOptions) -> dict[str, Any]:
    """Measure the attention of a run's checkpoint, write the report to `output` and give the result.

    Raises UserError for a mistake, before anything is written.
    """
    check_output(output)
    options.check()
    with alone():
        result = measure(*source.open(), options)
    write_report(output, "attention", result, attention_report.markdown(result), attention_report.figures(result))
    return result


def measure(run: Run, samples: int, options: MassOptions) -> dict[str, Any]:
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
    with progress(samples, "sequence") as bar:
        mass = attention_mass(
            run.model,
            run.pattern,
            run.validation,
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
    return {**describe(run, samples), **settings, "layers": layers, "heads": heads, **summary(mass, separators, window)}


def _chosen(what: str, asked: Sequence[int] | None, there: int) -> list[int]:
    wrong = [number for number in asked or () if not 0 <= number < there]
    require(not wrong, f"--{what} {wrong[0] if wrong else ''}: this model has {what} 0 to {there - 1}.")
    return sorted(set(asked)) if asked else list(range(there))


def group_masks(separators: Sequence[int], edges: Sequence[int], window: int) -> dict[str, Tensor]:
    """Which kinds and ranges make up each of GROUPS: bool [K, E]; each kind and range is in exactly one.

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

"""Tables and pictures of what `study` found."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from sepllm_train.analysis import plots
from sepllm_train.analysis.probe.facts import VALUES
from sepllm_train.analysis.probe.interventions import DECIDING, MASKED, REPLACED
from sepllm_train.compare.tables import Table

FIRST = f"right value first of {VALUES}"
READING = (
    "Only what queries at the window's distance or more read of separators is changed; neighbours, keys, initial "
    "tokens and the learned sink stay. share = (loss with values replaced - loss) / (loss with far separators masked - "
    f"loss), per seed; `{DECIDING}` decides: values of separators of the same class in another held-out text. Over 0.5 "
    "supports summary, under 0.2 refutes it; three seeds. The first separator of a class has no earlier segment and "
    "keeps its own value in `another segment`. Far-recall tokens repeat a bigram whose last occurrence is further back "
    "than all windows together reach. Intervals are Student's t over seeds; ± is one standard error over samples."
)


def markdown(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    runs = result["runs"]
    return "\n".join(
        [
            "# Summary or sink?\n",
            f"{headline(result['verdict'], len(runs))}\n",
            f"{len(runs)} runs of {result['parameters_without_embeddings'] / 1e6:.2f}M parameters without embeddings, "
            f"{result['layers']} layers of n = {result['window']}, sequences of {result['length']:,} tokens, sink: "
            f"{result['sink']}, no full layer. Stacked windows reach {result['reach']} tokens. {READING}\n",
            *(table.markdown() for table in (_over_seeds(result), _by_seed(result), _associative(result))),
            *([_needles(result).markdown()] if runs[0]["needles"] else []),
        ]
    )


def headline(verdict: dict[str, Any], seeds: int) -> str:
    """The verdict and the shares that it and the other reading go by."""
    beside = verdict["beside"]
    own, other = ("" if one["share"] is None else f" Share {_interval(one['share'])}" for one in (verdict, beside))
    found = own and f"{own} with `{verdict['by']}` on far-recall tokens, {seeds} seed{'s' * (seeds > 1)}."
    told = other and f"{other} with `{beside['by']}` of the same text, which does not decide: {beside['answer']}."
    return f"**{verdict['answer'].capitalize()}.**{found}{told}"


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Pictures, by file name."""
    groups = [name for name in result["groups"] if name != "all"]
    changes = {key: [result["groups"][name]["changes"][key]["mean"] for name in groups] for key in (MASKED, *REPLACED)}
    found = {
        "loss_by_intervention": plots.bars(
            "What far separators are worth", groups, changes, "change in loss (nats per token), mean over seeds"
        ),
        "recall_by_distance": _recall_figure(result, "associative", "Associative recall in held-out text"),
    }
    if result["runs"][0]["needles"]:
        found["needles"] = _recall_figure(result, "needles", "One fact in real text")
    return found


def _over_seeds(result: dict[str, Any]) -> Table:
    rows = []
    for name, group in result["groups"].items():
        for key in (MASKED, *REPLACED):
            share = group["shares"].get(key)
            told = "1" if key == MASKED else "-" if share is None else _interval(share)
            rows.append([name, key, f"{group['loss']['mean']:.4f}", _interval(group["changes"][key], "+"), told])
    return Table("Over seeds", ["tokens", "far separators", "loss", "change in loss", "share"], rows)


def _by_seed(result: dict[str, Any]) -> Table:
    rows = []
    for run in result["runs"]:
        for name, group in run["groups"].items():
            changes = [f"{found.mean:+.4f} ± {found.error:.4f}" for found in group["changes"].values()]
            share = group["shares"][DECIDING]
            told = "-" if share is None else f"{share:.2f}"
            rows.append([str(run["seed"]), name, f"{group['tokens']:,}", f"{group['loss'].mean:.4f}", *changes, told])
    heads = ["seed", "tokens", "count", "loss", MASKED, *REPLACED, f"share, {DECIDING}"]
    return Table("Seed by seed, change in loss", heads, rows)


def _associative(result: dict[str, Any]) -> Table:
    rows = [
        [
            str(run["seed"]),
            row["distances"],
            f"{row['questions']:,}",
            f"{row['first']:.1%}",
            f"{row['first_masked']:.1%}",
        ]
        for run in result["runs"]
        for row in run["associative"]
    ]
    heads = ["seed", "tokens back", "questions", FIRST, "far separators masked"]
    return Table("Associative recall in held-out text", heads, rows)


def _needles(result: dict[str, Any]) -> Table:
    rows = [
        [
            str(run["seed"]),
            f"{row['distance']:.0f}",
            str(row["needles"]),
            f"{row['first']:.1%}",
            f"{row['first_masked']:.1%}",
            f"{row['prefers_twin']:.1%}",
            f"{row['follows_twin']:.1%}",
        ]
        for run in result["runs"]
        for row in run["needles"]
    ]
    heads = [
        "seed",
        "tokens back",
        "needles",
        FIRST,
        "far separators masked",
        "prefers the twin's value",
        "with the twin's values of far separators",
    ]
    return Table("Needles: one fact in real text, and its twin with another value", heads, rows)


def _recall_figure(result: dict[str, Any], key: str, title: str) -> Figure:
    """Share of right answers by distance, each seed a line, dashed with far separators masked."""
    curves: list[plots.Curve] = []
    for number, run in enumerate(result["runs"]):
        away = [row["distance"] for row in run[key]]
        curves.append((f"seed {run['seed']}", away, [row["first"] for row in run[key]], {"colour": number}))
        masked = [row["first_masked"] for row in run[key]]
        style = {"colour": number, "dashed": True}
        curves.append((f"seed {run['seed']}, far separators masked", away, masked, style))
    return plots.lines(title, curves, "tokens back", FIRST, log_x=True, level=1 / VALUES)


def _interval(estimate: dict[str, Any], sign: str = "") -> str:
    """Mean and interval of an estimate over seeds."""
    mean = f"{estimate['mean']:{sign}.3f}"
    if estimate["low"] is None:
        return mean
    return f"{mean} ({estimate['low']:{sign}.3f} to {estimate['high']:{sign}.3f})"

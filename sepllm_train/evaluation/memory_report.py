"""Loss and needles against the keys that are kept: a table and a figure of results of benchmarks/equal_memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sepllm_train.base.errors import UserError
from sepllm_train.base.figures import COLOURS, DASHES, INK, MARKERS, dressed, legend_below, picture
from sepllm_train.base.parsing import read_json
from sepllm_train.base.statistics import Estimate, token_mean
from sepllm_train.evaluation.equal_memory import FORMAT
from sepllm_train.evaluation.results import EQUAL_MEMORY, missing, printable

_SHORT = {
    "full": "all keys",
    "h2o": "H2O",
    "snapkv": "SnapKV",
    "pyramidkv": "PyramidKV",
    "streamingllm": "StreamingLLM",
    "tova": "TOVA",
    "knorm": "key norm",
    "random": "random",
    "sepllm": "SepLLM",
    "sep": "SepCache",
    "streaming": "StreamingCache",
    "fixed": "FixedCache",
    "pattern": "PatternCache",
}
# What is read of a result, and of what type it is.
_CONTENT: dict[str, Any] = {
    "format": int,
    "model": {"name": str, "fingerprint": str},
    "tokenizer_sha256": str,
    "memory": {"name": str, "source": str},
    "measure": str,
    "prompt": int,
    "data": {"sequences_sha256": str, "tokens": int},
    "value": float | int,
    "error": float | int,
    "values": list,
    "keys_at_prompt_end": float | int,
    "mean_keys": float | int,
}
# Panels in a row, and inches of each.
_ACROSS, _PANEL = 2, (4.8, 3.4)


def read_memories(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The results in folders. Raises UserError for a file that is not a whole result, and for results that are not of
    the same texts, tokens and tokenizer."""
    remedy = "measure it again with benchmarks/equal_memory"
    results = []
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        result = read_json(path, remedy, nan=True)
        wrong = "kind" if result.get("kind") != EQUAL_MEMORY else missing(result, _CONTENT)
        if wrong is None and not (result["format"] == FORMAT and _whole(result)):
            wrong = "content"
        if wrong is not None:
            raise UserError(f"{path} is not a whole result of benchmarks/equal_memory ({wrong}): {remedy}.")
        results.append({**result, "file": str(path)})
    _check(results)
    return results


def memory_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a table for each measure and length of the prompt, a row for each result.

    The differences are to all keys of the first model that has them, paired by sequence.
    """
    parts = []
    for (measure, prompt), group in panels(results).items():
        whole = next((result for result in group if result["memory"]["name"] == "full"), None)
        heads = ["model", "keys kept by", "at most", "at the prompt's end", "mean", measure, "minus all keys"]
        rows = [heads, ["---"] * 2 + ["---:"] * 5]
        for result in group:
            budget = result["memory"].get("keys")
            rows.append(
                [
                    result["model"]["name"],
                    _label(result),
                    "-" if budget is None else f"{budget:,}",
                    f"{result['keys_at_prompt_end']:,.1f}",
                    f"{result['mean_keys']:,.1f}",
                    _with_error(Estimate(result["value"], result["error"])),
                    "-" if whole is None or whole is result else _with_error(difference(result, whole), "+"),
                ]
            )
        sequences = len(group[0]["values"])
        lines = [f"{_quantity(measure).capitalize()} after prompts of {prompt:,} tokens, {sequences} sequences:", ""]
        parts.append("\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]))
    return "\n".join(parts)


def difference(one: dict[str, Any], other: dict[str, Any]) -> Estimate:
    """Mean of `one` minus `other` over the sequences that both are of, with its standard error."""
    values = torch.tensor([one["values"], other["values"]], dtype=torch.float64)
    return token_mean((values[0] - values[1])[:, None])


def memory_figure(results: Sequence[dict[str, Any]]) -> Figure:
    """Loss and needles against the mean keys, a panel for each measure and length of the prompt; solid lines are this
    project's caches, dashed ones KVPress."""
    groups = panels(results)
    across = min(_ACROSS, len(groups))
    down = math.ceil(len(groups) / across)
    curves = list(dict.fromkeys(_curve(result) for result in results if result["memory"]["name"] != "full"))
    styles = {name: number for number, name in enumerate(curves)}

    def draw(figure: Figure) -> None:
        plots = figure.subplots(down, across, squeeze=False).flatten()
        for plot, ((measure, prompt), group) in zip(plots, groups.items(), strict=False):
            dressed(plot, f"prompts of {prompt:,} tokens", "keys per layer and head, mean", _quantity(measure))
            plot.set_xscale("log", base=2)
            plot.xaxis.set_major_formatter(lambda keys, _: f"{keys:,.0f}")
            if measure != "loss":
                plot.set_ylim(-0.05, 1.05)
            _draw(plot, group, styles)
        for plot in plots[len(groups) :]:
            plot.set_visible(False)
        shown = {
            label: handle for plot in plots for handle, label in zip(*plot.get_legend_handles_labels(), strict=True)
        }
        legend_below(figure, handles=list(shown.values()), labels=list(shown))

    return picture((_PANEL[0] * across, _PANEL[1] * down + 1.2), draw)


def _draw(plot: Axes, group: Sequence[dict[str, Any]], styles: dict[tuple[str, str], int]) -> None:
    """The curves of a panel; all keys are a line across."""
    whole = {result["model"]["fingerprint"]: result for result in group if result["memory"]["name"] == "full"}
    for result, style in zip(whole.values(), (":", "-.", "--", "-") * len(whole), strict=False):
        label = f"{_SHORT['full']}, {result['model']['name']}"
        plot.axhline(result["value"], color=INK, linewidth=0.9, linestyle=style, label=label)
    for curve, number in styles.items():
        points = sorted((result for result in group if _curve(result) == curve), key=lambda one: one["mean_keys"])
        if not points:
            continue
        theirs = points[0]["memory"]["source"] == "kvpress"
        plot.errorbar(
            [point["mean_keys"] for point in points],
            [point["value"] for point in points],
            color=COLOURS[number % len(COLOURS)],
            linestyle=DASHES if theirs else "-",
            linewidth=1.2 if theirs else 2,
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            label=f"{_label(points[0])}, {points[0]['model']['name']}",
        )


def panels(results: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """The results by measure and length of the prompt."""
    keys = sorted({(result["measure"], result["prompt"]) for result in results})
    return {key: [result for result in results if (result["measure"], result["prompt"]) == key] for key in keys}


def _quantity(measure: str) -> str:
    return "loss (nats per token)" if measure == "loss" else f"needles found ({measure})"


def _label(result: dict[str, Any]) -> str:
    memory = result["memory"]
    name = _SHORT.get(memory["name"], memory["name"])
    return f"{name}, KVPress" if memory["source"] == "kvpress" else name


def _curve(result: dict[str, Any]) -> tuple[str, str]:
    return result["model"]["fingerprint"], _label(result)


def _with_error(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.mean:{sign},.4f} ± {estimate.error:.4f}"


def _whole(result: dict[str, Any]) -> bool:
    """True for names that fit a table, and numbers in the place of numbers."""
    names = (result["model"]["name"], result["memory"]["name"], result["measure"])
    values = result["values"]
    return all(map(printable, names)) and bool(values) and all(isinstance(value, float | int) for value in values)


def _check(results: Sequence[dict[str, Any]]) -> None:
    """Raise UserError for results that cannot be compared, or that are there twice."""
    seen: set[tuple[Any, ...]] = set()
    for group in panels(results).values():
        for result in group:
            for name, facts in (("tokenizer", "tokenizer_sha256"), ("texts or tokens", "data")):
                own, other = (_facts(one, facts) for one in (result, group[0]))
                if own != other:
                    raise UserError(
                        f"{group[0]['file']} and {result['file']} differ in their {name}: they cannot be compared."
                    )
            row = (*_curve(result), result["memory"].get("keys"), result["measure"], result["prompt"])
            if row in seen:
                raise UserError(f"{result['file']} is of a model, method and number of keys that another is of too.")
            seen.add(row)


def _facts(result: dict[str, Any], key: str) -> Any:
    facts = result[key]
    return facts if isinstance(facts, str) else (facts["sequences_sha256"], facts["tokens"], len(result["values"]))

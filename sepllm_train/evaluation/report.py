"""The paper's tables from results of evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sepllm_train.base.errors import UserError
from sepllm_train.evaluation.results import attention_of, conditions, model_of, read_result

# Heading, task, metric, factor: those of the paper's table for models trained from scratch.
_COLUMNS = (
    ("ARC-c", "arc_challenge", "acc", 100),
    ("ARC-e", "arc_easy", "acc", 100),
    ("LAMBADA ppl", "lambada", "perplexity", 1),
    ("LAMBADA acc", "lambada", "acc", 100),
    ("LogiQA", "logiqa", "acc", 100),
    ("PIQA", "piqa", "acc", 100),
    ("SciQ", "sciq", "acc", 100),
    ("WikiText word ppl", "wikitext", "word_perplexity", 1),
    ("GSM8K-CoT flexible", "gsm8k_cot", "exact_match,flexible-extract", 100),
    ("GSM8K-CoT strict", "gsm8k_cot", "exact_match,strict-match", 100),
    ("MMLU", "mmlu", "acc", 100),
)
_TASKS = tuple(dict.fromkeys(task for _, task, *_ in _COLUMNS))
# Rows of a model in the paper's order.
_ORDER = ("dense", "streaming", "fixed", "pattern", "cache")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder. Raises UserError when there is none, or a file is not a whole result."""
    results = [read_result(path) for path in sorted(folder.glob("*.json"))]
    if not results:
        raise UserError(f"{folder} holds no results: make them with `sepllm evaluate ... --output {folder}`.")
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each model and attention, a column for each metric that was measured, then the shares, and
    notes below. Raises UserError when results of a column are not of the same documents and prompts, or those of a row
    not of the same model and attention."""
    rows = _rows(results)
    measured = {result["task"] for result in results}
    _check(results)
    tasks = dict.fromkeys((*_TASKS, *(result["task"] for result in results)))
    others = dict.fromkeys((result["task"], metric) for result in results for metric in result["metrics"])
    columns: list[tuple[str, str, str, int | None]] = [column for column in _COLUMNS if column[1] in measured]
    columns += [(f"{task} {metric}", task, metric, None) for task, metric in others if task not in _TASKS]
    # Shares depend on the texts: only tasks that all rows have can be compared.
    common = [task for task in tasks if all(task in row for row in rows.values())]
    several = len({name for name, _ in rows}) > 1
    heads = [*(("model",) if several else ()), "attention", *(head for head, *_ in columns), "attended", "KV kept"]
    lines = [heads, ["---", *(["---"] if several else []), *["---:"] * (len(columns) + 2)]]
    for (name, label), row in rows.items():
        cells = [_cell(row.get(task), metric, factor) for _, task, metric, factor in columns]
        shares = [_mean(row, common, key) for key in ("attended_share", "kv_share")]
        lines.append([*((name,) if several else ()), label, *cells, *shares])
    missing = [head for head, task, *_ in _COLUMNS if task not in measured]
    notes = [
        "Accuracies of the paper's tasks in %, other tasks' figures as the harness has them. Attended and KV kept: "
        "keys seen over all keys, over all tokens, and over those whose "
        f"successors were scored or generated; means over {', '.join(common) or 'no task, as none is in all rows'}."
    ]
    notes += [_scope(task, results) for task in tasks if task in measured]
    if missing and measured & set(_TASKS):
        notes.append(f"Not measured: {', '.join(missing)}.")
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([body, "", *(f"- {note}" for note in notes)]) + "\n"


def _rows(results: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """By (name of the folder or the model, attention) the results by task. Raises UserError when one is there twice,
    and for a folder of several models or a row of several attentions."""
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    first_of_folder: dict[str, dict[str, Any]] = {}
    for result in results:
        name, label = _source(result), result["attention"]["label"]
        row = rows.setdefault((name, label), {})
        if result["task"] in row:
            raise UserError(f"{name} has two results of {result['task']} under {label}.")
        _check_same(first_of_folder.setdefault(name, result), result, model_of)
        _check_same(next(iter(row.values()), result), result, attention_of)
        row[result["task"]] = result
    models = list(first_of_folder)
    return dict(sorted(rows.items(), key=lambda row: (models.index(row[0][0]), _place(row[1]))))


def _source(result: dict[str, Any]) -> str:
    """The folder of a result, or its model's name where it is not from a file."""
    return str(Path(result["file"]).parent) if "file" in result else result["model"]["name"]


def _check_same(one: dict[str, Any], other: dict[str, Any], facts: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Raise UserError when two results of a folder differ in their `facts`."""
    for key, value in facts(one).items():
        if value != facts(other)[key]:
            raise UserError(
                f"{one.get('file')} and {other.get('file')} are in one folder and differ in the {key}: give each a "
                "folder of its own."
            )


def _place(row: dict[str, dict[str, Any]]) -> int:
    return _ORDER.index(next(iter(row.values()))["attention"]["name"])


def _check(results: Sequence[dict[str, Any]]) -> None:
    """Raise UserError when results of a task are not of the same documents and prompts."""
    first: dict[str, dict[str, Any]] = {}
    for result in results:
        own, other = _basis(result), first.setdefault(result["task"], _basis(result))
        for key, value in own.items():
            if value != other[key]:
                raise UserError(
                    f"results of {result['task']} have a different {key} ({other[key]} and {value}): they cannot be "
                    "compared."
                )


def _basis(result: dict[str, Any]) -> dict[str, Any]:
    """Values that results of a task must have in common to be compared."""
    return {
        **conditions(result),
        "number of documents": result["documents"],
        "number of truncated prompts": result["truncated_prompts"],
    }


def _cell(result: dict[str, Any] | None, metric: str, factor: int | None) -> str:
    """A figure times `factor`, or as it is where that is None."""
    if result is None or metric not in result["metrics"]:
        return "-"
    value = result["metrics"][metric]["value"]
    if factor is None:
        return f"{value:,.2f}" if abs(value) >= 10 else f"{value:.4f}"
    return f"{factor * value:,.2f}"


def _mean(row: dict[str, dict[str, Any]], tasks: Sequence[str], key: str) -> str:
    """The mean of a share over tasks, in %; "-" where one was not counted."""
    shares = [row[task][key] for task in tasks]
    return "-" if not shares or None in shares else f"{100 * fmean(shares):.2f}"


def _scope(task: str, results: Sequence[dict[str, Any]]) -> str:
    """Documents and prompts of a column, where it is not all of the hub's documents."""
    result = next(result for result in results if result["task"] == task)
    parts = [f"{result['num_fewshot']}-shot"]
    if result["limit"] is not None:
        parts.append(f"first {result['documents']:,} of {result['documents_there']:,} documents")
    if result["truncated_prompts"]:
        parts.append(f"{result['truncated_prompts']:,} prompts cut on the left")
    if task == "wikitext":
        parts.append(f"the {result['split']} split")
    return f"{task}: {', '.join(parts)}."

"""A result as a file: its name, what it must hold, and what it must share with others to be compared or replaced."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sepllm_train.base.errors import UserError
from sepllm_train.base.parsing import read_json, read_json_if_any
from sepllm_train.generation.choice import ATTENTIONS

FORMAT = 1
# Kind of the results of benchmarks/equal_memory.
EQUAL_MEMORY = "equal memory"
# What the report reads of a result, and of what type it is.
_SHARE = float | int | None
_ABSENT = object()
# Characters of a name.
_LONGEST = 4096
_CONTENT: dict[str, Any] = {
    "task": str,
    "metrics": dict,
    "attention": {"name": str, "label": str},
    "model": {"name": str, "fingerprint": str, "dtype": str, "tokenizer_sha256": str},
    "data": {"source": str},
    "split": str,
    "limit": int | None,
    "num_fewshot": int,
    "documents": int,
    "documents_there": int,
    "truncated_prompts": int,
    "ranks": int,
    "attended_share": _SHARE,
    "kv_share": _SHARE,
}


def result_path(folder: Path, task: str, label: str) -> Path:
    """The file of a task's result under the attention `label`."""
    return folder / f"{task}.{label}.json".replace(":", "_")


def read_result(path: Path) -> dict[str, Any]:
    """A result; `file` in it says where it is from. Raises UserError when it is not one, or not a whole one."""
    result = read_json(path, "give a result of `sepllm evaluate`", nan=True)
    form = result.get("format")
    if form is None:
        raise UserError(f"{path} is not a result of `sepllm evaluate`.")
    if form != FORMAT:
        raise UserError(
            f"{path} is in format {repr(form)[:60]} and this version reads format {FORMAT}: evaluate again."
        )
    wrong = missing(result, _CONTENT)
    if wrong is not None:
        raise UserError(
            f"{path} is not a whole result of `sepllm evaluate`: its {wrong} is missing or of another type."
        )
    if not printable(result["task"]) or result["attention"]["name"] not in ATTENTIONS:
        raise UserError(f"{path} is of a task or an attention that this version does not know.")
    if not result["metrics"]:
        raise UserError(f"{path} holds no metrics: evaluate {result['task']} again.")
    damaged = _damaged(result)
    if damaged is not None:
        raise UserError(f"{path} is not a whole result of `sepllm evaluate`: its {damaged}.")
    return {**result, "file": str(path)}


def missing(content: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first key of `wanted`, a type or a dict of further keys for each, that `content` does not have, or not with a
    value of its type; a bool is no number."""
    for key, kind in wanted.items():
        inner = kind if isinstance(kind, dict) else {}
        if (
            key not in content
            or isinstance(content[key], bool)
            or not isinstance(content[key], dict if inner else kind)
        ):
            return key
        deeper = missing(content[key], inner) if inner else None
        if deeper is not None:
            return f"{key}.{deeper}"
    return None


def printable(text: str) -> bool:
    """True for a text that fits in a line of a table."""
    return 0 < len(text) <= _LONGEST and text.isprintable()


def _damaged(result: dict[str, Any]) -> str | None:
    """The impossible value in a result of the right types, or None."""
    for place, text in (("attention.label", result["attention"]["label"]), ("model.name", result["model"]["name"])):
        if not printable(text):
            return f"{place} is no name"
    for name, entry in result["metrics"].items():
        if not isinstance(entry, dict) or missing(entry, {"value": float | int}) is not None:
            return f"metrics.{name[:60]!r} has no value"
    for split, file in _files(result).items():
        if not isinstance(file, dict) or not isinstance(file.get("sha256"), str):
            return f"data.files.{split[:60]!r} has no sha256"
    for key in ("attended_share", "kv_share"):
        if result[key] is not None and not (math.isnan(result[key]) or 0 <= result[key] <= 1):
            return f"{key} is not between 0 and 1"
    for key in ("num_fewshot", "documents", "documents_there", "truncated_prompts"):
        if result[key] < 0:
            return f"{key} is below 0"
    return None


def _files(result: dict[str, Any]) -> dict[str, Any]:
    """The files of a result's data by split; none for data of the hub."""
    files = result["data"].get("files")
    return files if isinstance(files, dict) else {}


def model_of(result: dict[str, Any]) -> dict[str, Any]:
    """Values that results of one model share."""
    model = result["model"]
    return {"model": model["fingerprint"], "dtype": model["dtype"], "tokenizer": model["tokenizer_sha256"]}


def attention_of(result: dict[str, Any]) -> dict[str, Any]:
    """Values that results under one label share: the attention, with the token ids of its separators."""
    return {"attention": result["attention"]}


def conditions(result: dict[str, Any]) -> dict[str, Any]:
    """Values that results of a task must share to be compared, as far as they are settled before the evaluation."""
    files = _files(result)
    return {
        "limit": result["limit"],
        "split": result["split"],
        "number of examples": result["num_fewshot"],
        # Examples are drawn by each rank for its documents.
        "number of ranks": result["ranks"] if result["num_fewshot"] else 1,
        "data": {split: file["sha256"][:8] for split, file in files.items()} or result["data"]["source"],
    }


def refuse_other(path: Path, planned: dict[str, Any]) -> None:
    """Raise UserError when `path` is there and is not a result of the model, attention and conditions of `planned`."""
    if not path.exists():
        return
    own, there = _identity(planned), _identity(read_result(path))
    for key, value in own.items():
        if there[key] != value:
            raise UserError(
                f"{path} holds a result with a different {key}: choose another --output, or replace it with "
                "--overwrite."
            )


def _identity(result: dict[str, Any]) -> dict[str, Any]:
    return model_of(result) | attention_of(result) | conditions(result)


def holds_memories(folder: Path) -> bool:
    """True for a folder with results of benchmarks/equal_memory."""
    return any(read_json_if_any(path).get("kind") == EQUAL_MEMORY for path in folder.glob("*.json"))

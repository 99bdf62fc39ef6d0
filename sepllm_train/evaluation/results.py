"""A result as a file: its name, what it must hold, and what it must share with others to be compared or replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sepllm_train.base.errors import UserError
from sepllm_train.base.parsing import read_json
from sepllm_train.evaluation.tasks import TASKS
from sepllm_train.generation.choice import ATTENTIONS

FORMAT = 1
# What the report reads of a result, and of what type it is.
_SHARE = float | int | None
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
    return folder / f"{task}.{label.replace(':', '_')}.json"


def read_result(path: Path) -> dict[str, Any]:
    """A result; `file` in it says where it is from. Raises UserError when it is not one, or not a whole one."""
    result = read_json(path, "give a result of `sepllm evaluate`", nan=True)
    form = result.get("format")
    if form is None:
        raise UserError(f"{path} is not a result of `sepllm evaluate`.")
    if form != FORMAT:
        raise UserError(f"{path} is in format {form!r} and this version reads format {FORMAT}: evaluate again.")
    wrong = _wrong(result, _CONTENT)
    if wrong is not None:
        raise UserError(
            f"{path} is not a whole result of `sepllm evaluate`: its {wrong} is missing or of another type."
        )
    if result["task"] not in TASKS or result["attention"]["name"] not in ATTENTIONS:
        raise UserError(f"{path} is of a task or an attention that this version does not know.")
    if not result["metrics"]:
        raise UserError(f"{path} holds no metrics: evaluate {result['task']} again.")
    return {**result, "file": str(path)}


def _wrong(content: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first key of `wanted` that `content` does not have, or not with a value of its type."""
    for key, kind in wanted.items():
        inner = kind if isinstance(kind, dict) else {}
        if key not in content or not isinstance(content[key], dict if inner else kind):
            return key
        deeper = _wrong(content[key], inner) if inner else None
        if deeper is not None:
            return f"{key}.{deeper}"
    return None


def model_of(result: dict[str, Any]) -> dict[str, Any]:
    """Values that results of one model share."""
    model = result["model"]
    return {"model": model["fingerprint"], "dtype": model["dtype"], "tokenizer": model["tokenizer_sha256"]}


def attention_of(result: dict[str, Any]) -> dict[str, Any]:
    """Values that results under one label share: the attention, with the token ids of its separators."""
    return {"attention": result["attention"]}


def conditions(result: dict[str, Any]) -> dict[str, Any]:
    """Values that results of a task must share to be compared, as far as they are settled before the evaluation."""
    files = result["data"].get("files", {})
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

"""Results of streams: reading one, and a table of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sepllm_train.base.console import quantity
from sepllm_train.base.errors import UserError
from sepllm_train.base.parsing import read_json
from sepllm_train.evaluation.results import missing, printable
from sepllm_train.generation.choice import CACHES

RESULT = "result.json"
_SCORE_AGAIN = "remove it and score the text again"
_SIZES = ("initial", "separators", "window", "capacity")
# What is read of a result and of its points, and of what type it is.
_POINT: dict[str, Any] = {"tokens": int, "perplexity": float | int}
_CONTENT: dict[str, Any] = {
    **_POINT,
    "seconds": float | int,
    "mean_length": float | int,
    "points": list,
    "cache": str,
    "fingerprint": str,
    "text": object,
    "positions_used": str,
}
_SHORT = {"streaming": "StreamingLLM", "sep": "SepLLM", "fixed": "fixed interval", "pattern": "pattern", "full": "full"}


def report(folders: Sequence[Path], at: Sequence[int]) -> str:
    """Markdown: a row per stream, perplexity at the numbers of tokens `at` (empty: at the end of the shortest stream).

    Raises UserError when a folder has no finished stream, or the streams are of different texts or models.
    """
    results = [read_stream(folder) for folder in folders]
    for result in results[1:]:
        for key in ("fingerprint", "text"):
            if result[key] != results[0][key]:
                raise UserError(f"{folders[0]} and another stream have a different {key}: they cannot be compared.")
    at = list(at) or [min(result["tokens"] for result in results)]
    heads = ["cache", "a", "s", "w", "c", "positions", *(f"ppl at {quantity(n)}" for n in at), "mean keys", "tok/s"]
    rows = [_row(result, at) for result in results]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _row(result: dict[str, Any], at: Sequence[int]) -> list[str]:
    sizes = [str(result[key]) if result.get(key) is not None else "" for key in
             _SIZES]  # fmt: skip
    by_tokens = {point["tokens"]: point["perplexity"] for point in result["points"]}
    found = [f"{by_tokens[n]:.2f}" if n in by_tokens else "-" for n in at]
    name = _SHORT[result["cache"]] + (f" D = {result['interval']}" if result.get("interval") else "")
    rate = f"{result['tokens'] / result['seconds']:,.0f}"
    return [name, *sizes, result["positions_used"], *found, f"{result['mean_length']:.1f}", rate]


def read_stream(folder: Path) -> dict[str, Any]:
    """Read `folder`/result.json. Raises UserError when it is not there or not what `sepllm stream score` writes."""
    path = folder / RESULT
    if not path.exists():
        raise UserError(f"{path} is not there: finish the stream with `sepllm stream score`.")
    result = read_json(path, _SCORE_AGAIN, nan=True)
    if not _is_result(result):
        raise UserError(f"{path} is not what `sepllm stream score` writes: {_SCORE_AGAIN}.")
    return result


def _is_result(content: dict[str, Any]) -> bool:
    """True for a result with all that is read of it."""
    if missing(content, _CONTENT) is not None or content["cache"] not in CACHES or not content["seconds"] > 0:
        return False
    sizes = [content.get(key) for key in (*_SIZES, "interval")]
    return (
        all(isinstance(point, dict) and missing(point, _POINT) is None for point in content["points"])
        and all(size is None or type(size) is int for size in sizes)
        and printable(content["positions_used"])
    )

"""A table of streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sepllm_train.base.console import quantity
from sepllm_train.base.errors import UserError
from sepllm_train.evaluation.stream_score import read_result

_SHORT = {"streaming": "StreamingLLM", "sep": "SepLLM", "fixed": "fixed interval", "pattern": "pattern", "full": "full"}


def report(folders: Sequence[Path], at: Sequence[int]) -> str:
    """Markdown: a row per stream, perplexity at the numbers of tokens `at` (empty: at the end of the shortest stream).

    Raises UserError when a folder has no finished stream, or the streams are of different texts or models.
    """
    results = [read_result(folder) for folder in folders]
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
             ("initial", "separators", "window", "capacity")]  # fmt: skip
    by_tokens = {point["tokens"]: point["perplexity"] for point in result["points"]}
    found = [f"{by_tokens[n]:.2f}" if n in by_tokens else "-" for n in at]
    name = _SHORT[result["cache"]] + (f" D = {result['interval']}" if result.get("interval") else "")
    rate = f"{result['tokens'] / result['seconds']:,.0f}"
    return [name, *sizes, result["positions_used"], *found, f"{result['mean_length']:.1f}", rate]

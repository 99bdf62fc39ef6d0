"""Records in the trainer's format, with costs that are easy to count."""

from __future__ import annotations

from typing import Any

COMPARABLE = {
    "data": {"corpus": {"sha256": "abc", "weight": 1.0}},
    "tokenizer": "d" * 64,
    "vocabulary": 4096,
    "sequence_length": 2048,
    "seed_of_data_order": 1234,
}


def counters(step: int, cost: float) -> dict[str, Any]:
    """What every record counts after `step` steps of 1000 tokens, a token costing `cost` thousand FLOPs."""
    tokens = 1000 * step
    return {
        "step": step,
        "tokens": tokens,
        "seconds": cost * step / 2,
        "flops/model": int(1000 * cost) * tokens,
        "flops/dense": 4000 * tokens,
        "flops/paper": int(500 * cost) * tokens,
    }


def validation(step: int, loss: float | None, cost: float = 4.0, **more: Any) -> dict[str, Any]:
    """A validation record."""
    bits = None if loss is None else loss / 2
    return {**counters(step, cost), "val/loss": loss, "val/bits_per_byte": bits, **more}


def training(step: int, loss: float, cost: float = 4.0) -> dict[str, Any]:
    """A training record."""
    rate = {"train/lr": 6e-4, "train/grad_norm": 1.0, "train/tokens_per_second": 2000 / cost}
    return {**counters(step, cost), "train/loss": loss, **rate}


def evaluation(step: int, score: float, cost: float = 4.0, **conditions: Any) -> dict[str, Any]:
    """A record of an evaluation on piqa, under `conditions`, and on a task of one metric."""
    scores = {"eval/piqa/acc_norm": score / 2, "eval/piqa/acc": score, "eval/piqa/acc_stderr": 0.01}
    tasks = {"piqa": {"documents": 100} | conditions, "wikitext": {"documents": 2}}
    more = {"eval/wikitext/word_perplexity": 10 / score, "eval/seconds": 2.0, "evaluation": tasks}
    return {**counters(step, cost), **scores, **more}


def straight(steps: float, cost: float = 4.0) -> list[dict[str, Any]]:
    """Validations of a loss that falls along a straight line from 6 and is 5 after `steps` of 40 steps."""
    return [validation(step, 6 - step / steps, cost) for step in (0, 10, 20, 30, 40)]


def unwrapped(text: str) -> str:
    """Text of the terminal without its line breaks."""
    return " ".join(text.split())

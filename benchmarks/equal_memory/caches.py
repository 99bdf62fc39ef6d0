"""Loss and needles of a model whose prompts go through the caches of this project.

    python -m benchmarks.equal_memory.caches models/books_sep --text pg19_test.jsonl.bz2 --unwrap --prompt 1024 \
        --keys 128,256 --output memory/sep

benchmarks/equal_memory/presses.py measures the same with KVPress, in an environment of its own.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.common import exit_with
from sepllm_train.base.errors import UserError
from sepllm_train.evaluation.equal_memory import (
    PromptMemory,
    add_options,
    check_options,
    local_window,
    measure,
    separators_kept,
)
from sepllm_train.evaluation.stream_model import Opened, make_cache, open_model
from sepllm_train.generation.choice import CLASSES, AttentionChoice
from sepllm_train.hf import cache_argument, trained_pattern

MEMORIES = ("full", "pattern", "sep", "streaming", "fixed")
# Caches drop keys when they are full, to fewer by this part of their capacity: every prompt token costs a forward if
# that is one key.
_SLACK = 16


def main() -> None:
    """Run the program. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, MEMORIES)
    parser.add_argument("--interval", type=int, default=8, metavar="D", help="of `fixed`: every D-th token (8)")
    parser.add_argument("--positions", choices=("training", "cache"), default="training", help="places at which keys"
                        " are compared: in the text, as KVPress has them (the default), or in the cache")  # fmt: skip
    options = parser.parse_args()
    check_options(options, MEMORIES)
    opened = open_model(str(options.model), None, "fp32", "cpu")
    if trained_pattern(opened.model.config) is None and "pattern" in options.memories:
        options.memories.remove("pattern")
    choices = [choice for name in options.memories for choice in _choices(name, options)]
    measure((_memory(opened, choice) for choice in choices), opened.tokenizer, options)


def _choices(name: str, options: argparse.Namespace) -> Iterator[AttentionChoice]:
    """The caches of a name, one for each number of keys, which is the most that it ever holds."""
    if name in ("full", "pattern"):
        yield AttentionChoice(name)
        return
    for keys in options.keys:
        window = local_window(options, keys) - max(1, keys // _SLACK)
        separators = None if name == "streaming" else separators_kept(options, keys)
        if separators is None:
            window += separators_kept(options, keys)
        if window < 1:
            raise UserError(f"--keys {keys} leaves no local window beside --initial {options.initial}: give more.")
        yield AttentionChoice(
            name,
            initial=options.initial,
            window=window,
            separators=separators,
            # The paper's are the default, and a model that was trained with separators knows its own.
            classes=None if options.classes == CLASSES else options.classes,
            capacity=keys,
            interval=options.interval if name == "fixed" else None,
            positions=options.positions,
        )


def _memory(opened: Opened, choice: AttentionChoice) -> PromptMemory:
    with warnings.catch_warnings():
        # That a dense model was not trained with a cache is what is measured here.
        warnings.simplefilter("ignore")
        cache = make_cache(opened, choice)
    return PromptMemory(
        name=choice.name,
        source="sepllm-train",
        budget=choice.capacity,
        settings={**choice.describe(), "positions": cache.positions, "differences": list(cache.differences)},
        model=opened.model,
        new_cache=partial(_emptied, cache),
        count=_keys_seen,
        argument=cache_argument(opened.model),
    )


def _emptied(cache: Any) -> Any:
    cache.reset()
    return cache


def _keys_seen(cache: Any) -> float:
    """Keys per layer and row that the newest token saw, its own included. A pattern's cache drops keys in pieces, and
    hides from a token what the pattern does not show it."""
    counts = [held.slots.visible(1).sum() / len(held.slots.length) for held in cache.held]
    return sum(float(counts[group]) for group in cache.group_of_layer) / len(cache.group_of_layer)


if __name__ == "__main__":
    exit_with(main)

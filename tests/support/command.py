"""Commands of `sepllm` in the process of a test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sepllm_train.cli.main import main


def command(name: str) -> Callable[[Sequence[Any]], int]:
    """`sepllm NAME` as a function of its words that returns the exit code."""
    return lambda words: main([*name.split(), *map(str, words)])


def program(name: str) -> Callable[[Sequence[Any]], None]:
    """`sepllm NAME` as a function of its words that ends as a process does: SystemExit unless the code is 0."""

    def run(words: Sequence[Any]) -> None:
        if code := command(name)(words):
            raise SystemExit(code)

    return run

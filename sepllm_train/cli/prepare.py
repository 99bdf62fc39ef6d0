"""sepllm prepare: text to tokens and separator classes."""

from __future__ import annotations

from collections.abc import Sequence


def main(words: Sequence[str]) -> None:
    """Run a command of data preparation. Raises UserError."""
    from data_prep.cli import run

    run(words)

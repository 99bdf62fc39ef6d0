"""Choice of the next token, and the text of those chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from data_prep.tokenizers import Tokenizer

# What decoders write for bytes that are no whole character.
_UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Sampling:
    """Rule by which the next token is chosen.

    temperature: 0 takes the likeliest token, otherwise logits are divided by it. top_k: only so many of the
    likeliest tokens; top_p: of these the fewest of at least this probability together; None for all. seed: of row 0;
    row b has a generator of its own, with seed + b, so that its text does not depend on the others.

    Raises UserError for numbers out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.temperature < float("inf"), f"--temperature {self.temperature:g} must be 0 or more.")
        require(self.top_k is None or self.top_k >= 1, f"--top-k {self.top_k} must be at least 1.")
        require(self.top_p is None or 0 < self.top_p <= 1, f"--top-p {self.top_p} must be above 0 and at most 1.")
        require(0 <= self.seed < 2**62, f"--seed {self.seed} must lie between 0 and 2^62.")
        require(
            self.temperature > 0 or (self.top_k is None and self.top_p is None),
            "--top-k and --top-p need a --temperature above 0: without one the likeliest token is taken.",
        )

    def generators(self, rows: int) -> list[torch.Generator]:
        """One generator for each row."""
        # Imported late, so that mistakes in numbers are answered at once.
        import torch

        return [torch.Generator().manual_seed(self.seed + row) for row in range(rows)]

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The next token of each row, i64 [B], from logits fp32 [B, V]. Raises UserError for logits not finite."""
        # The least and the largest are finite only where all are: NaN takes the place of both.
        if not all(math.isfinite(bound) for bound in logits.aminmax()):
            raise UserError(
                "the model's logits are not finite: the weights of this checkpoint, or its precision, are bad."
            )
        import torch

        if self.temperature == 0:
            return logits.argmax(-1)
        # On the CPU, where a seed gives the same numbers on every machine.
        logits = logits.cpu() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, -1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        probability, order = logits.softmax(-1).sort(-1, descending=True)
        if self.top_p is not None:
            # The token that crosses top_p is still one of them.
            probability = probability.masked_fill(probability.cumsum(-1) - probability >= self.top_p, 0.0)
        drawn = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(probability, generators, strict=True)
        ]
        return order.gather(1, torch.stack(drawn))[:, 0]


class TextStream:
    """Text of the tokens that follow `before`, in pieces: a character that takes several tokens comes when it is whole.

    Only the last tokens are decoded anew, together with some before them: a decoder may write a token otherwise at the
    beginning of a text.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before)
        self._start = 0
        self._shown = len(before)

    def add(self, token: int) -> str:
        """The text that is certain with one more token, since the last call; often empty."""
        self._ids.append(token)
        text, new = self._pending()
        if text.endswith(_UNFINISHED):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return new

    def end(self) -> str:
        """The rest, with a mark in the place of a character that was not finished."""
        return self._pending()[1]

    def _pending(self) -> tuple[str, str]:
        known = self._tokenizer.decode(self._ids[self._start : self._shown])
        text = self._tokenizer.decode(self._ids[self._start :])
        return text, text[len(known) :]

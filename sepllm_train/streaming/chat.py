"""Generation that goes on: what is typed and what is answered stay in one cache, for as long as one likes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import UserError
from sepllm_train.hf.hooks import cache_argument
from sepllm_train.streaming.model import Opened


@dataclass(frozen=True)
class ChatOptions:
    """tokens: at most so many per answer. temperature 0 takes the likeliest token; top_p the likeliest ones that make
    up this probability."""

    tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise UserError for numbers that make no sense."""
        if self.tokens < 1:
            raise UserError(f"--tokens={self.tokens} must be at least 1.")
        if self.temperature < 0:
            raise UserError(f"--temperature={self.temperature} must be 0 or more.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p={self.top_p} must be above 0 and at most 1.")


def chat(opened: Opened, cache: Any, options: ChatOptions, lines: Iterable[str]) -> None:
    """Continue each line of `lines` on the terminal; the cache remembers what came before."""
    options.check()
    device = next(opened.model.parameters()).device
    generator = torch.Generator(device).manual_seed(options.seed)
    for line in lines:
        ids = opened.tokenizer.encode_batch([line.rstrip("\n")])[0]
        if not ids:
            continue
        _answer(opened, cache, options, torch.tensor([ids], device=device), generator)
        sys.stdout.write("\n")
        print(f"[{cache.columns_seen:,} tokens seen, {cache.lengths[0]} in the cache]", file=sys.stderr, flush=True)


def _answer(opened: Opened, cache: Any, options: ChatOptions, ids: Tensor, generator: torch.Generator) -> None:
    answer: list[int] = []
    given = {cache_argument(opened.model): cache}
    shown = ""
    with torch.inference_mode():
        for _ in range(options.tokens):
            logits = opened.model(ids, **given).logits[0, -1].float()
            ids = pick(logits, options.temperature, options.top_p, generator)[None, None]
            answer.append(int(ids))
            if answer[-1] == opened.tokenizer.eod:
                break
            text = opened.tokenizer.decode(answer)
            # A character may take several tokens: until it is whole it decodes to a mark of its own.
            if not text.endswith("\ufffd"):
                sys.stdout.write(text[len(shown) :])
                sys.stdout.flush()
                shown = text
        # The last token was not given to the model yet.
        opened.model(ids, **given)


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """A token, i64 scalar, from logits [V]; temperature 0 is the likeliest."""
    if temperature == 0:
        return logits.argmax()
    probability, order = (logits / temperature).softmax(-1).sort(descending=True)
    # The token that crosses top_p is still one of them.
    probability[probability.cumsum(-1) - probability >= top_p] = 0
    return order[torch.multinomial(probability, 1, generator=generator)[0]]

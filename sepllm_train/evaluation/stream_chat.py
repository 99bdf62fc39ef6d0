"""Generation that goes on: what is typed and what is answered stay in one cache, for as long as one likes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sepllm_train.evaluation.stream_model import Opened, check_context
from sepllm_train.generation.sampling import Sampling, TextStream
from sepllm_train.hf.hooks import cache_argument


def chat(opened: Opened, cache: Any, name: str, sampling: Sampling, tokens: int, lines: Iterable[str]) -> None:
    """Continue each line of `lines` on the terminal, by at most `tokens` tokens; the cache remembers all of it.

    name: the cache's, as on the command line. Raises UserError before a line whose answer might not fit the model's
    context, in a cache that is bound to it, and for logits that are not finite.
    """
    device = next(opened.model.parameters()).device
    generators = sampling.generators(1)
    for line in lines:
        ids = opened.tokenizer.encode_batch([line.rstrip("\n")])[0]
        if not ids:
            continue
        check_context(cache, name, cache.columns_seen + len(ids) + tokens, "begin anew or ask for fewer --tokens")
        _answer(opened, cache, sampling, tokens, torch.tensor([ids], device=device), generators)
        sys.stdout.write("\n")
        print(f"[{cache.columns_seen:,} tokens seen, {cache.lengths[0]} in the cache]", file=sys.stderr, flush=True)


def _answer(
    opened: Opened, cache: Any, sampling: Sampling, tokens: int, ids: Tensor, generators: list[torch.Generator]
) -> None:
    shown = TextStream(opened.tokenizer, ids[0].tolist())
    given = {cache_argument(opened.model): cache}
    with torch.inference_mode():
        for _ in range(tokens):
            logits = opened.model(ids, **given).logits[:, -1].float()
            ids = sampling.choose(logits, generators).to(ids.device)[:, None]
            if int(ids) == opened.tokenizer.eod:
                break
            sys.stdout.write(shown.add(int(ids)))
            sys.stdout.flush()
        # The last token was not given to the model yet.
        opened.model(ids, **given)
    sys.stdout.write(shown.end())

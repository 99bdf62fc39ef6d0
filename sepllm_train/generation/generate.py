"""The loop of generation: feed tokens, choose the next ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from sepllm_train.generation.native import NativeCache
from sepllm_train.generation.sampling import Sampling

OnToken = Callable[[int, int], object]


@dataclass
class Continuation:
    """Text generated for a prompt: its `tokens`, the one that ended it included; `ended`, True when it ended by itself;
    the mean `cache_length` in keys over tokens and layers; the `seconds` since the prompts were given."""

    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    cache_length: float = 0.0
    seconds: float = 0.0


def generate(
    cache: NativeCache,
    prompts: Sequence[Sequence[int]],
    count: int,
    sampling: Sampling,
    *,
    end: int | None = None,
    on_token: OnToken = lambda row, token: None,
) -> list[Continuation]:
    """Continue each prompt by up to `count` tokens, fewer where token `end` comes (None: it ends nothing).

    cache: an empty one with a row for each prompt. prompts: ids, at least one each. Calls on_token(row, token) for each
    token. Every tensor-parallel rank calls this and gets the same result. Raises UserError as `Sampling.choose` does.
    """
    began = time.perf_counter()
    found = [Continuation() for _ in prompts]
    generators = sampling.generators(len(prompts))
    ids, valid = left_padded(prompts)
    logits = cache.feed(ids.to(cache.device), valid.to(cache.device))
    rows = list(range(len(prompts)))
    while True:
        chosen = _same_on_all_ranks(sampling.choose(logits, [generators[row] for row in rows]).to(logits.device), cache)
        going = []
        for place, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            one = found[row]
            one.tokens.append(token)
            on_token(row, token)
            one.ended = token == end
            if one.ended or len(one.tokens) == count:
                one.cache_length, one.seconds = cache.mean_lengths()[place], time.perf_counter() - began
            else:
                going.append(place)
        if not going:
            return found
        if len(going) < len(rows):
            rows = [rows[place] for place in going]
            kept = torch.tensor(going, device=chosen.device)
            cache.select(kept)
            chosen = chosen[kept]
        logits = cache.feed(chosen[:, None])


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids as i64 [B, N] with padding on the left, and bool [B, N], where there is none."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows])
    valid = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return ids, valid


def _same_on_all_ranks(chosen: Tensor, cache: NativeCache) -> Tensor:
    """Broadcast the tokens that the first tensor-parallel rank has chosen.

    Ranks that continue with different ones would compute nonsense, or hang.
    """
    group = cache.model.tp_group
    if group.size() > 1:
        dist.broadcast(chosen, group=group, group_src=0)
    return chosen

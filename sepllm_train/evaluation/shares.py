"""Share of a text that a model saw while it was evaluated: counted over the very sequences that ran.

Shape letters: B sequences, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from sep_attention.pairs import keys_per_query
from torch import Tensor

from sepllm_train.evaluation.attention import Attention
from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.generation.slots import CachePolicy, Slots

# Tokens counted at once, padding included.
_AT_ONCE = 65536


@dataclass(frozen=True)
class Scored:
    """Tokens that a model was given. `prompt_end`: number of the last token of the prompt; `first`: number of the first
    token whose successor was scored or generated."""

    ids: Sequence[int]
    prompt_end: int
    first: int


@dataclass
class Shares:
    """Sums over distinct sequences of the keys that tokens saw, the mean over the layers, and of all there were.

    `found`: for each sequence (keys, all keys) over all tokens, at the last token of the prompt, and over the tokens
    whose successors were scored or generated: f64 [6].
    """

    found: dict[bytes, np.ndarray] = field(default_factory=dict)

    def note(self, attention: Attention, sequences: Sequence[Scored]) -> None:
        """Count sequences that were not counted yet."""
        new = {key: one for one in sequences if one.ids and (key := _key(one)) not in self.found}
        ordered = sorted(new.items(), key=lambda entry: len(entry[1].ids))
        while ordered:
            rows = max(1, _AT_ONCE // len(ordered[-1][1].ids))
            batch, ordered = ordered[-rows:], ordered[:-rows]
            kept = keys_seen(attention, [one.ids for _, one in batch])
            for (key, one), row in zip(batch, kept, strict=True):
                self.found[key] = _sums(row[: len(one.ids)], one)

    def summary(self) -> dict[str, float | int | None]:
        """attended_share: keys seen over all keys, over all tokens. kv_share_prompt: the same at the last tokens of the
        prompts. kv_share: the same over the tokens whose successors were scored or generated: the paper's runtime KV.
        Each is a ratio of sums over all sequences and layers, None where nothing was counted."""
        total = np.sum(list(self.found.values()), axis=0) if self.found else np.zeros(6)
        names = ("attended_share", "kv_share_prompt", "kv_share")
        shares = {
            name: float(seen / every) if every else None
            for name, seen, every in zip(names, total[0::2], total[1::2], strict=True)
        }
        return {"sequences": len(self.found), **shares}


def keys_seen(attention: Attention, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """f64 [B, T]: keys that each token sees, itself included, the mean over layers. What is beyond a row's end is
    padding, which no token of the row sees, and means nothing."""
    longest = max(map(len, rows))
    if attention.pattern is None:
        return np.broadcast_to(np.arange(1.0, longest + 1), (len(rows), longest))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    if attention.policies is None:
        plan = attention.pattern.plan(ids)
        layers = attention.pattern.windows
        counts = {window: keys_per_query(plan, window, attention.pattern.horizons) for window in set(layers)}
        return np.mean([counts[window].numpy() for window in layers], axis=0)
    lengths = {policy: cache_lengths(policy, attention.pattern, ids) for policy in set(attention.policies)}
    return np.mean([lengths[policy].numpy() for policy in attention.policies], axis=0)


def cache_lengths(policy: CachePolicy, pattern: TokenPattern, ids: Tensor) -> Tensor:
    """i64 [B, T]: keys in a layer's cache at each token, itself included; by the cache's own bookkeeping."""
    rows, tokens = ids.shape
    reach = pattern.reach(ids, torch.arange(tokens).expand(rows, tokens))
    slots = Slots.empty(policy, rows, ids.device)
    lengths = []
    start = 0
    while start < tokens:
        if bool(slots.full().any()):
            slots, _ = slots.drop()
        end = min(tokens, start + int((slots.limit - slots.length).min()))
        lengths.append(slots.length[:, None] + torch.arange(1, end - start + 1))
        slots = slots.append(reach[:, start:end], torch.ones(rows, end - start, dtype=torch.bool))
        start = end
    return torch.cat(lengths, 1)


def _sums(kept: np.ndarray, one: Scored) -> np.ndarray:
    every = np.arange(1, len(one.ids) + 1)
    spans = (slice(None), slice(one.prompt_end, one.prompt_end + 1), slice(one.first, None))
    return np.array([side[span].sum() for span in spans for side in (kept, every)])


def _key(one: Scored) -> bytes:
    numbers = np.array([one.prompt_end, one.first, *one.ids], dtype=np.int64)
    return hashlib.sha256(numbers.tobytes()).digest()[:16]

"""An attention pattern in terms of token ids: what a model without our data's side-car needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sep_attention import FOREVER, AttentionPlan, build_plan
from sep_attention.plan import is_traced
from torch import Tensor

from data_prep.separators import class_numbers, classify
from data_prep.tokenizers import Tokenizer
from sepllm_train.generation.slots import CachePolicy
from sepllm_train.model.pattern import AttentionPattern

FORMAT = 1
# Entries of a vocabulary beyond which a number is none of a model's.
_MOST_ENTRIES = 1 << 26


@dataclass(frozen=True, eq=False)
class TokenPattern:
    """Key j is visible to query i iff 0 <= i - j < max(window of the layer, horizon of j's tier).

    Attributes:
        windows: local window per layer, the token itself included; FOREVER for layers that attend fully.
        initial: first tokens of the sequence, which are permanent keys.
        horizons: tokens within which keys of tier 1, 2, ... are seen; FOREVER without end.
        tier_of_token: u8 [V], 0 for ordinary tokens.
        interval: every interval-th token is in tier 1 in place of separators; None for separators.
        end_of_document: id after which the pattern starts anew, None when it does not.
        copies: tier_of_token on each device that asked for it, so that a forward does not wait for a transfer.
    """

    windows: tuple[int, ...]
    initial: int
    horizons: tuple[int, ...]
    tier_of_token: Tensor
    interval: int | None = None
    end_of_document: int | None = None
    copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.copies[self.tier_of_token.device] = self.tier_of_token

    @classmethod
    def of_run(cls, pattern: AttentionPattern, classes: np.ndarray, end_of_document: int) -> TokenPattern:
        """The pattern of a run; classes: u8 [V], separator class of each vocabulary entry."""
        return cls(
            windows=tuple(layer.window for layer in pattern.layers),
            initial=pattern.initial_tokens,
            horizons=pattern.layers[0].horizons,
            tier_of_token=torch.from_numpy(pattern.tier_of_class[classes]),
            interval=pattern.interval,
            end_of_document=end_of_document if pattern.separate_documents else None,
        )

    @classmethod
    def from_separators(
        cls, separators: Sequence[int], vocabulary: int, layers: int, *, window: int, initial: int
    ) -> TokenPattern:
        """The paper's pattern: the same window in every layer, the tokens `separators` permanent.

        Raises ValueError for ids outside of the vocabulary.
        """
        wrong = [index for index in separators if not 0 <= index < vocabulary]
        if wrong:
            raise ValueError(
                f"separator id {wrong[0]} is outside of the model's vocabulary of {vocabulary} entries: the ids are "
                "another tokenizer's."
            )
        tiers = torch.zeros(vocabulary, dtype=torch.uint8)
        tiers[torch.tensor(list(separators), dtype=torch.int64)] = 1
        return cls((window,) * layers, initial, (FOREVER,), tiers)

    @property
    def separators(self) -> list[int]:
        """Ids of the tokens in any tier, ascending."""
        return self.tier_of_token.nonzero().flatten().tolist()

    @property
    def dense(self) -> bool:
        """True when every layer attends fully."""
        return all(window >= FOREVER for window in self.windows) and self.end_of_document is None

    def policy(self, layer: int) -> CachePolicy:
        """Policy of layer `layer` under which generation sees what the pattern shows."""
        return CachePolicy(self.windows[layer], self.initial)

    def reach(self, ids: Tensor, position: Tensor) -> Tensor:
        """i64, like ids: tokens within which each counts as a separator, 0 for ordinary ones.

        position: i64, like ids, position of each token in its sequence.
        """
        if self.interval is not None:
            return torch.where(position % self.interval == 0, FOREVER, 0)
        horizon = torch.tensor((0, *self.horizons), device=ids.device)
        return horizon[self.tiers(ids)]

    def reach_of_token(self) -> Tensor:
        """i32 [V], `reach` of every vocabulary entry. Raises ValueError where it depends on the position."""
        if self.interval is not None:
            raise ValueError(f"interval={self.interval} makes separators of positions, not of tokens.")
        return torch.tensor((0, *self.horizons), dtype=torch.int32)[self.tier_of_token.long()]

    def tiers(self, ids: Tensor) -> Tensor:
        """i64, like ids: tier of each token. Raises ValueError for ids beyond the vocabulary, on the CPU."""
        if (
            ids.device.type == "cpu"
            and not is_traced(ids)
            and ids.numel()
            and int(ids.max()) >= len(self.tier_of_token)
        ):
            raise ValueError(
                f"token id {int(ids.max())} is beyond the pattern's vocabulary of {len(self.tier_of_token)} entries."
            )
        if ids.device not in self.copies:
            self.copies[ids.device] = self.tier_of_token.to(ids.device)
        return self.copies[ids.device][ids].long()

    def plan(self, ids: Tensor, valid: Tensor | None = None) -> AttentionPlan:
        """Attention plan of whole sequences. ids: i64 [B, S]; valid: bool [B, S], False for padding before or behind a
        row's tokens. No host sync, but for the checks on the CPU."""
        position = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        start = torch.zeros_like(position)
        if self.end_of_document is not None:
            first = torch.cat((torch.zeros_like(ids[:, :1]), (ids[:, :-1] == self.end_of_document).long()), 1)
            start = torch.where(first > 0, position, 0).cummax(1).values
        padding = torch.zeros_like(ids[:, :1])
        if valid is not None:
            # Padding in front is a document of its own: what follows does not see it and has initial tokens of its own.
            # No token sees what is behind it.
            padding = (~valid).long().cumprod(1).sum(1, keepdim=True)
            start = torch.where(position < padding, 0, torch.maximum(start, padding))
        if self.interval is not None:
            tier = ((position - padding) % self.interval == 0).to(torch.uint8)
        else:
            tier = self.tiers(ids).to(torch.uint8)
        separate = valid is not None or self.end_of_document is not None
        return build_plan(
            tier,
            initial_tokens=self.initial,
            document_start=start if separate else None,
            num_tiers=len(self.horizons),
        )

    def to_dict(self) -> dict[str, Any]:
        """Content for config.json; windows and horizons without end are null."""
        return {
            "format": FORMAT,
            "windows": [_finite(window) for window in self.windows],
            "initial_tokens": self.initial,
            "tiers": [
                {"horizon": _finite(horizon), "tokens": (self.tier_of_token == tier).nonzero().flatten().tolist()}
                for tier, horizon in enumerate(self.horizons, 1)
            ],
            "interval": self.interval,
            "end_of_document": self.end_of_document,
            "vocabulary": len(self.tier_of_token),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TokenPattern:
        """Read the result of `to_dict`. Raises ValueError when it is not that."""
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r} is not {FORMAT}")
            if not (type(content["vocabulary"]) is int and 0 < content["vocabulary"] <= _MOST_ENTRIES):
                raise ValueError(f"vocabulary {repr(content['vocabulary'])[:40]}")
            for key, least in (("interval", 1), ("end_of_document", 0)):
                if content[key] is not None and (type(content[key]) is not int or content[key] < least):
                    raise ValueError(f"{key} {repr(content[key])[:40]}")
            numbers = [content["initial_tokens"], *content["windows"], *(tier["horizon"] for tier in content["tiers"])]
            if any(number is not None and not 0 <= int(number) <= FOREVER for number in numbers):
                raise ValueError("a count of tokens out of range")
            tiers = torch.zeros(content["vocabulary"], dtype=torch.uint8)
            for number, tier in enumerate(content["tiers"], 1):
                tiers[torch.tensor(tier["tokens"], dtype=torch.int64)] = number
            return cls(
                windows=tuple(FOREVER if window is None else int(window) for window in content["windows"]),
                initial=int(content["initial_tokens"]),
                horizons=tuple(FOREVER if t["horizon"] is None else int(t["horizon"]) for t in content["tiers"]),
                tier_of_token=tiers,
                interval=content["interval"],
                end_of_document=content["end_of_document"],
            )
        except (KeyError, TypeError, IndexError, ValueError, RuntimeError, ArithmeticError, AttributeError) as error:
            raise ValueError(f"the separator pattern cannot be read ({error}): export the model again.") from None


def separator_ids(tokenizer: Tokenizer, selection: str = "paper") -> list[int]:
    """Ids of a tokenizer's separators, found from the strings of its entries.

    selection: `paper`, `all`, or class names as in attention.separators, comma-separated.
    Raises ValueError when no entry is one.
    """
    wanted = class_numbers(selection)
    found = np.isin(classify(tokenizer.token_bytes()), wanted).nonzero()[0].tolist()
    if not found:
        raise ValueError(
            f"{tokenizer.path} has no separators among {selection}: choose other classes, or give separator ids."
        )
    return found


def _finite(tokens: int) -> int | None:
    return None if tokens >= FOREVER else tokens

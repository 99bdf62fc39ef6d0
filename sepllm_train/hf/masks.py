"""Masks of keys in the form of transformers' models, and the biases that go with them in models with ALiBi (Press et
al. 2022, arXiv:2108.12409).

These make their biases from a mask of two dimensions or from the number of keys, so a mask of our own, and the biases
of the keys' positions in the text, are given to their layers.

Shape letters: B rows (sequences), N new tokens, W keys, H heads.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """bool [B, N, W] as [B, 1, N, W]: 0 where a key is seen, the least number of `dtype` where it is not."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)[:, None]


class Biases:
    """Arguments with which the layers of a BLOOM, an MPT or a Falcon with ALiBi see some keys of a text."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        # The model's own numbers [H, P] for positions from 0 on (MPT: up to that of the newest key), and what they
        # were made for; longer ones are made when a text needs them.
        self._table = torch.zeros(0, 0)
        self._made_for: tuple[Any, ...] = ()

    @classmethod
    def of(cls, base: Any) -> Biases | None:
        """Those of a model without its head; None for a model without ALiBi."""
        config = base.config.get_text_config()
        known = config.model_type in ("bloom", "mpt") or (config.model_type == "falcon" and config.alibi)
        return cls(config.model_type) if known else None

    @property
    def one_text(self) -> bool:
        """True for a model that adds the same biases to all rows of a batch."""
        return self.kind == "mpt"

    def arguments(self, base: Any, mask: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Arguments of a layer. mask: bool [B, N, W], keys that are seen; positions: i64 [B, W], below 0 for none.

        Raises ValueError for rows with different keys where the model adds the same biases to all rows.
        """
        if self.one_text:
            back = _shared(base, positions - positions[:, -1:], positions >= 0)
            table = self._reaching(base, 1 - int(back.min()))
            return {"attention_mask": ~mask[:, None], "position_bias": table[:, None, back - 1]}
        positions = positions.clamp(min=0)
        table = self._reaching(base, int(positions.max()) + 1)
        bias = table[:, positions].transpose(0, 1)
        if self.kind == "bloom":
            return {"attention_mask": additive(mask, base.dtype), "alibi": bias.flatten(0, 1)[:, None]}
        bias = bias[:, :, None]
        # As FalconModel does; its eager attention adds the biases once more, here as without a pattern.
        scaled = bias / (base.config.hidden_size // base.num_heads) ** 0.5
        return {"attention_mask": scaled.masked_fill(~mask[:, None], torch.finfo(base.dtype).min), "alibi": bias}

    def _reaching(self, base: Any, positions: int) -> Tensor:
        """The table for at least so many positions."""
        made_for = (base.device, base.dtype)
        if self._table.shape[1] < positions or self._made_for != made_for:
            size = 1 << max(positions - 1, 255).bit_length()
            if self.one_text:
                made = base.build_mpt_alibi_tensor(base.num_heads, size, device=base.device)
            else:
                build = sys.modules[type(base).__module__].build_alibi_tensor
                made = build(torch.ones(1, size, dtype=torch.int64, device=base.device), base.num_heads, base.dtype)
            self._table, self._made_for = made[:, 0], made_for
        return self._table


def _shared(base: Any, back: Tensor, there: Tensor) -> Tensor:
    """Distances i64 [W] that all rows have; back: i64 [B, W] of each row, there: which of them count."""
    least = torch.iinfo(torch.int64).min
    common = torch.where(there, back, least).amax(0)
    if bool(((back != common) & there).any()):
        raise ValueError(
            f"{type(base).__name__} adds the same ALiBi biases to all rows of a batch, and this cache holds different "
            "keys of each: give it one text at a time."
        )
    return torch.where(common == least, 0, common)

"""SepLLM as a press of KVPress (https://github.com/NVIDIA/kvpress)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from kvpress import ScorerPress
from kvpress.utils import compute_n_kept
from torch import Tensor, nn

from sepllm_train.evaluation.equal_memory import separator_scores


@dataclass
class SepLLMPress(ScorerPress):
    """Keep of a prompt the first tokens, the last ones, and the newest separators; then the newest of all others.

    Attributes:
        separator_ids: token ids that separate.
        initial: first tokens that stay.
        window: last tokens that stay.
    """

    separator_ids: Sequence[int] = ()
    initial: int = 4
    window: int = 128

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """Compress the prompt that the model reads in the block."""

        def note_ids(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            self._is_separator = torch.isin(ids, torch.tensor(self.separator_ids, device=ids.device))

        hook = model.model.register_forward_pre_hook(note_ids, with_kwargs=True)
        try:
            with super().__call__(model):
                yield
        finally:
            hook.remove()

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Scores [B, heads, L], the same for all heads. Raises ValueError when initial tokens and window do not fit."""
        kept = compute_n_kept(keys.shape[2], self.compression_ratio)
        if kept < self.initial + self.window:
            raise ValueError(f"initial={self.initial} + window={self.window} are more than the {kept} keys to keep.")
        scores = separator_scores(self._is_separator, self.initial, self.window)
        return scores[:, None].expand(keys.shape[:3])

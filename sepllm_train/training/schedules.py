"""Settings that change from step to step: the window that is drawn, the sequence length, and the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sepllm_train.config.curriculum import Phase, phases_of, samples_of
from sepllm_train.config.schema import Config
from sepllm_train.data.loader import Batch
from sepllm_train.model.pattern import AttentionPattern, resolve_pattern


@dataclass(frozen=True)
class StepSchedule:
    """Pattern, length and batch of each step, a function of the seed and the step alone. Steps are counted from 1.

    `base` is the pattern of validation, generation and export. `patterns` are those that a step draws from, by the
    window of their layers that are not full; with the one window of the configuration or a list for the layers there is
    nothing to draw, and `patterns` is empty. `phases` cover the steps of the run; the last one has the whole length and
    batch.
    """

    base: AttentionPattern
    patterns: dict[int, AttentionPattern]
    phases: list[Phase]
    seed: int

    @property
    def drawn_from(self) -> list[AttentionPattern]:
        """The patterns that steps have, each equally likely."""
        return list(self.patterns.values()) or [self.base]

    @property
    def length(self) -> int:
        """Tokens of a sample, and of a sequence of validation and of the last phase."""
        return self.phases[-1].length

    def window(self, step: int) -> int | None:
        """The window that a step draws; None when there is nothing to draw."""
        return draw(list(self.patterns), self.seed, step) if self.patterns else None

    def pattern(self, step: int) -> AttentionPattern:
        """The pattern of a step."""
        window = self.window(step)
        return self.base if window is None else self.patterns[window]

    def phase(self, step: int) -> Phase:
        """The phase of a step."""
        return next(phase for phase in self.phases if step <= phase.last)

    def samples(self, steps: int) -> int:
        """Samples that the first `steps` steps read."""
        return samples_of(self.phases, steps)


def schedule_of(config: Config) -> StepSchedule:
    """The schedule of a run. Raises UserError as `resolve_pattern` does."""
    attention, layers = config.attention, config.model.layers
    patterns = {
        window: resolve_pattern(replace(attention, window=window, window_choices=None), layers)
        for window in attention.window_choices or ()
    }
    return StepSchedule(resolve_pattern(attention, layers), patterns, phases_of(config), config.seed)


def draw(choices: Sequence[int], seed: int, step: int) -> int:
    """One of `choices`, each equally likely: the same in every layout, after a resume and under every library."""
    digest = hashlib.sha256(f"{seed} window {step}".encode()).digest()
    return choices[int.from_bytes(digest, "little") % len(choices)]


def cut(batch: Batch, length: int) -> Batch:
    """Samples cut into sequences of `length` tokens, which divides S: entries [B, S] become [B S / length, length].

    The sequences of a sample follow one another. All are views but `document_start`, which is counted from the first
    token of the new sequence, 0 where the document begins before it. With S tokens the batch stays as it is.
    """
    batch_size, whole = batch["separator_class"].shape
    if length == whole:
        return batch
    pieces = {key: entry.view(-1, length) for key, entry in batch.items()}
    first = torch.arange(0, whole, length, device=batch["document_start"].device, dtype=torch.int32)
    pieces["document_start"] = (pieces["document_start"] - first.repeat(batch_size)[:, None]).clamp_(min=0)
    return pieces

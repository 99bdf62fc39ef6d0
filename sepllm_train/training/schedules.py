"""What changes from step to step: the window that is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sepllm_train.attention_pattern import AttentionPattern, resolve_pattern
from sepllm_train.config.schema import Config


@dataclass(frozen=True)
class StepSchedule:
    """What each step trains with, a function of the seed and the step alone.

    `base` is the pattern of validation, generation and export. `patterns` are those that a step draws from, by the
    window of their layers that are not full; with the one window of the configuration or a list for the layers there is
    nothing to draw, and `patterns` is empty.
    """

    base: AttentionPattern
    patterns: dict[int, AttentionPattern]
    seed: int

    @property
    def drawn_from(self) -> list[AttentionPattern]:
        """The patterns that steps have, each equally likely."""
        return list(self.patterns.values()) or [self.base]

    def window(self, step: int) -> int | None:
        """The window that step `step`, counted from 1, draws; None when there is nothing to draw."""
        return draw(list(self.patterns), self.seed, step) if self.patterns else None

    def pattern(self, step: int) -> AttentionPattern:
        """The pattern of step `step`, counted from 1."""
        window = self.window(step)
        return self.base if window is None else self.patterns[window]


def schedule_of(config: Config) -> StepSchedule:
    """The schedule of a run. Raises UserError as `resolve_pattern` does."""
    attention, layers = config.attention, config.model.layers
    patterns = {
        window: resolve_pattern(replace(attention, window=window, window_choices=None), layers)
        for window in attention.window_choices or ()
    }
    return StepSchedule(resolve_pattern(attention, layers), patterns, config.seed)


def draw(choices: Sequence[int], seed: int, step: int) -> int:
    """One of `choices`, each equally likely: the same in every layout, after a resume and under every library."""
    digest = hashlib.sha256(f"{seed} window {step}".encode()).digest()
    return choices[int.from_bytes(digest, "little") % len(choices)]

"""Phases of a run: which of its steps have which sequence length."""

from __future__ import annotations

from dataclasses import dataclass

from sepllm_train.config.schema import Config


@dataclass(frozen=True)
class Phase:
    """The steps `first` to `last` of a run, counted from 1, which train on sequences of `length` tokens."""

    length: int
    first: int
    last: int

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.last - self.first + 1


def phases_of(config: Config) -> list[Phase]:
    """The phases of a run: those of training.curriculum, then the rest of the steps at data.sequence_length.

    Numbers below 1 in the curriculum are taken as shares, and rounded to whole tokens and steps.
    """
    longest, total = config.data.sequence_length, config.training.steps
    phases = []
    done = 0
    for entry in config.training.curriculum:
        steps = _number(entry["steps"], total)
        phases.append(Phase(_number(entry["length"], longest), done + 1, done + steps))
        done += steps
    return [*phases, Phase(longest, done + 1, total)]


def curriculum_of(config: Config) -> list[dict[str, int]]:
    """training.curriculum in tokens and steps."""
    return [{"length": phase.length, "steps": phase.steps} for phase in phases_of(config)[:-1]]


def _number(value: float, whole: int) -> int:
    return round(value * whole) if value < 1 else int(value)

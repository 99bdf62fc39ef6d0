"""Phases of a run: which of its steps have which sequence length and which batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sepllm_train.config.schema import Config


@dataclass(frozen=True)
class Phase:
    """The steps `first` to `last` of a run, counted from 1, which read `batch` samples each, and train on them in
    sequences of `length` tokens."""

    length: int
    first: int
    last: int
    batch: int

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.last - self.first + 1


def phases_of(config: Config) -> list[Phase]:
    """The phases of a run that `validate` lets through: its steps of one length and one batch."""
    lengths, batches = curriculum_phases(config), batch_phases(config)
    phases: list[Phase] = []
    for last in sorted({phase.last for phase in (*lengths, *batches)}):
        length = next(phase.length for phase in lengths if last <= phase.last)
        batch = next(phase.batch for phase in batches if last <= phase.last)
        if phases and (phases[-1].length, phases[-1].batch) == (length, batch):
            phases[-1] = replace(phases[-1], last=last)
        else:
            phases.append(Phase(length, phases[-1].last + 1 if phases else 1, last, batch))
    return phases


def curriculum_phases(config: Config) -> list[Phase]:
    """The phases of training.curriculum, then the rest of the steps at data.sequence_length.

    Numbers below 1 in the curriculum are taken as shares, and rounded to whole tokens and steps.
    """
    longest, total, batch = config.data.sequence_length, config.training.steps, config.training.global_batch
    phases = []
    done = 0
    for entry in config.training.curriculum:
        steps = _number(entry["steps"], total)
        phases.append(Phase(_number(entry["length"], longest), done + 1, done + steps, batch))
        done += steps
    return [*phases, Phase(longest, done + 1, total, batch)]


def batch_phases(config: Config) -> list[Phase]:
    """The phases of training.batch_schedule, then the rest of the steps, perhaps none, at training.global_batch.

    A phase has the fewest steps that read its samples or tokens.
    """
    length, training = config.data.sequence_length, config.training
    phases = []
    done = 0
    for entry in training.batch_schedule:
        batch = entry["batch"]
        steps = -(-entry["samples"] // batch) if "samples" in entry else -(-entry["tokens"] // (batch * length))
        phases.append(Phase(length, done + 1, done + steps, batch))
        done += steps
    return [*phases, Phase(length, done + 1, training.steps, training.global_batch)]


def curriculum_of(config: Config) -> list[dict[str, int]]:
    """training.curriculum in tokens and steps."""
    return [{"length": phase.length, "steps": phase.steps} for phase in curriculum_phases(config)[:-1]]


def batch_schedule_of(config: Config) -> list[dict[str, int]]:
    """training.batch_schedule in steps, without steps at training.global_batch."""
    *early, last = batch_phases(config)
    return [{"batch": phase.batch, "steps": phase.steps} for phase in early if phase.batch != last.batch]


def samples_of(phases: Sequence[Phase], steps: int) -> int:
    """Samples that the first `steps` steps read. Steps beyond the last phase are as those in it."""
    *early, last = phases
    read = sum(max(0, min(steps, phase.last) - phase.first + 1) * phase.batch for phase in early)
    return read + max(0, steps - last.first + 1) * last.batch


def schedule_position(config: Config, steps: int) -> int:
    """Place in the learning rate's schedule after `steps` steps of it: their number, or with training.batch_schedule
    the samples that they read."""
    return samples_of(batch_phases(config), steps) if batch_schedule_of(config) else steps


def _number(value: float, whole: int) -> int:
    return round(value * whole) if value < 1 else int(value)

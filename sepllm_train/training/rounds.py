"""Models that train in turns in one process, so that a busy moment of the machine meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from megatron.core import parallel_state

from sepllm_train.config.schema import Config
from sepllm_train.data.choice import settle_separators
from sepllm_train.data.corpus import open_corpus_together
from sepllm_train.data.loader import MicroBatchSampler, micro_batches
from sepllm_train.data.splits import build_datasets
from sepllm_train.model.pattern import AttentionPattern
from sepllm_train.training.clock import PARTS
from sepllm_train.training.report import Facts, derive
from sepllm_train.training.schedules import StepSchedule, schedule_of
from sepllm_train.training.setup import Training, build_training
from sepllm_train.training.step import Stepper


@dataclass
class Rival:
    """One configuration in training: `seconds` of a step in each turn, `parts` of them by name, and visible pairs.

    Of a run whose steps differ `seconds` and `parts` are means over its steps, each window of a draw counting alike;
    `phase_seconds` has the seconds of a step in each turn for each phase of a curriculum.
    """

    config: Config
    schedule: StepSchedule
    stepper: Stepper
    training: Training
    facts: Facts
    batches: list[Iterator[Any]]
    seconds: list[float] = field(default_factory=list)
    phase_seconds: list[list[float]] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    pairs: int = 0
    done: int = 0

    def turn(self, steps: int, device: torch.device) -> None:
        """Train `steps` steps of each length and window that the run has, and note what they took."""
        phases = self.schedule.phases
        patterns = self.schedule.drawn_from * steps
        seconds, parts = [], dict.fromkeys(PARTS, 0.0)
        for phase in phases:
            seconds.append(self._steps(phase.length, patterns, device) / len(patterns))
            share = phase.steps / phases[-1].last / len(patterns)
            for part, total in self.stepper.clock.take().items():
                parts[part] += total * share
        self.phase_seconds.append(seconds)
        self.seconds.append(fmean(seconds, weights=[phase.steps for phase in phases]))
        self.parts.append(parts)
        self.done += len(phases) * len(patterns)

    def _steps(self, length: int, patterns: Sequence[AttentionPattern], device: torch.device) -> float:
        """Train a step with each pattern on sequences of `length` tokens; gives the seconds of all."""
        micro = self.config.training.global_batch // (self.config.training.micro_batch * self.facts.replicas)
        pairs = torch.zeros((), dtype=torch.int64, device=device)
        begin = time.perf_counter()
        for pattern in patterns:
            self.stepper.use(pattern, length)
            self.stepper.clock.begin()
            pairs += self.stepper.train(self.batches, micro, lambda number: None).pairs
            self.stepper.clock.end()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - begin
        self.pairs += int(pairs)
        return took

    def forget(self) -> None:
        """Leave out what was measured so far: the first turn warms up."""
        self.seconds, self.phase_seconds, self.parts, self.pairs, self.done = [], [], [], 0, 0


def build_rival(config: Config, world_size: int, device: torch.device) -> Rival:
    """Model, optimizer and data of a configuration, as a run makes them, inside the process grid.

    A rival that takes more steps than its run has reads the same data again.
    """
    corpus = open_corpus_together(config.data)
    config, _ = settle_separators(config, corpus)
    dataset, _ = build_datasets(config, corpus)
    schedule = schedule_of(config)
    facts = derive(config, schedule, corpus, dataset, world_size, device)
    training = build_training(config, facts.vocabulary, device)
    stepper = Stepper(config, schedule.base, training, device)

    def batches() -> Iterator[Any]:
        sampler = MicroBatchSampler(
            range(config.training.steps),
            global_batch=config.training.global_batch,
            micro_batch=config.training.micro_batch,
            replica=parallel_state.get_data_parallel_rank(),
            replicas=facts.replicas,
        )
        while True:
            yield from micro_batches(
                dataset,
                sampler,
                workers=config.data.workers,
                device=device,
                on_host=stepper.on_host,
                vocabulary=facts.vocabulary,
            )

    return Rival(config, schedule, stepper, training, facts, [batches() for _ in training.chunks])


def take_turns(rivals: Sequence[Rival], turns: int, steps: int, device: torch.device) -> Iterator[int]:
    """`turns` turns of `steps` steps of every rival after one that does not count; yields the number of each turn.

    The order turns round from turn to turn, so that none always follows the same other.
    """
    for number in range(turns + 1):
        for rival in rivals if number % 2 else reversed(rivals):
            rival.turn(steps, device)
            if number == 0:
                rival.forget()
        yield number

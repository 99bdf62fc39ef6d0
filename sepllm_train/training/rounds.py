"""Interleaved rounds: models that train alternately in one process, so that a busy moment slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from megatron.core import parallel_state

from sepllm_train.config.curriculum import Phase
from sepllm_train.config.schema import Config
from sepllm_train.data.choice import settle_separators
from sepllm_train.data.corpus import open_corpus_on_all_ranks
from sepllm_train.data.loader import MicroBatchSampler, micro_batches
from sepllm_train.data.splits import build_datasets, source_splits
from sepllm_train.model.pattern import AttentionPattern
from sepllm_train.training.clock import PARTS
from sepllm_train.training.facts import Facts, derive
from sepllm_train.training.schedules import StepSchedule, schedule_of
from sepllm_train.training.setup import Training, build_training
from sepllm_train.training.step import Stepper


@dataclass
class TimedRun:
    """One configuration in training: `seconds` of a step in each round, `parts` of them by name, and visible pairs.

    Of a run whose steps differ `seconds` and `parts` are means over its steps, each window of a draw counting alike;
    `phase_seconds` has the seconds of a step in each round for each phase.
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

    def train_round(self, steps: int, device: torch.device) -> None:
        """Train `steps` steps of each length, batch and window that the run has, and time them."""
        phases = self.schedule.phases
        patterns = self.schedule.drawn_from * steps
        seconds, parts = [], dict.fromkeys(PARTS, 0.0)
        for phase in phases:
            seconds.append(self._steps(phase, patterns, device) / len(patterns))
            share = phase.steps / phases[-1].last / len(patterns)
            for part, total in self.stepper.clock.take().items():
                parts[part] += total * share
        self.phase_seconds.append(seconds)
        self.seconds.append(fmean(seconds, weights=[phase.steps for phase in phases]))
        self.parts.append(parts)
        self.done += len(phases) * len(patterns)

    def _steps(self, phase: Phase, patterns: Sequence[AttentionPattern], device: torch.device) -> float:
        """Train a step of a phase with each pattern; gives their seconds."""
        pairs = torch.zeros((), dtype=torch.int64, device=device)
        begin = time.perf_counter()
        for pattern in patterns:
            self.stepper.use(pattern, phase.length)
            self.stepper.clock.begin()
            pairs += self.stepper.train(self.batches, self.facts.micro_batches(phase), lambda number: None).pairs
            self.stepper.clock.end()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - begin
        self.pairs += int(pairs)
        return took

    def forget(self) -> None:
        """Drop the measurements so far: the first round warms up."""
        self.seconds, self.phase_seconds, self.parts, self.pairs, self.done = [], [], [], 0, 0


def build_timed_run(config: Config, world_size: int, device: torch.device) -> TimedRun:
    """Model, optimizer and data of a configuration, as a run makes them, inside the process grid.

    One that takes more steps than its run has reads the same data again.
    """
    corpus = open_corpus_on_all_ranks(config.data)
    config, _ = settle_separators(config, corpus)
    dataset, validation = build_datasets(config, corpus)
    schedule = schedule_of(config)
    facts = derive(config, schedule, corpus, source_splits(corpus, dataset, validation), dataset, world_size, device)
    training = build_training(config, facts.vocabulary, device)
    stepper = Stepper(config, schedule.base, training, device)

    def batches() -> Iterator[Any]:
        sampler = MicroBatchSampler(
            range(facts.samples),
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

    return TimedRun(config, schedule, stepper, training, facts, [batches() for _ in training.chunks])


def interleave(runs: Sequence[TimedRun], rounds: int, steps: int, device: torch.device) -> Iterator[int]:
    """Train `rounds` rounds of `steps` steps of every run after one that does not count; yields their numbers.

    The order is reversed from round to round, so that none always follows the same other.
    """
    for number in range(rounds + 1):
        for run in runs if number % 2 else reversed(runs):
            run.train_round(steps, device)
            if number == 0:
                run.forget()
        yield number

"""A run from its checked configuration to its last checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from sepllm_train.base.console import duration, say
from sepllm_train.base.errors import Interrupted, RunStopped, UserError
from sepllm_train.config.curriculum import curriculum_of
from sepllm_train.config.schema import Config
from sepllm_train.data.choice import ClassChoice, settle_separators
from sepllm_train.data.corpus import Corpus, open_corpus_together
from sepllm_train.data.splits import build_datasets, source_splits
from sepllm_train.data.unchanged import DataFiles
from sepllm_train.distributed.collectives import together
from sepllm_train.distributed.launch import Launch
from sepllm_train.distributed.optional import optional_packages
from sepllm_train.metrics.log import MetricsLog
from sepllm_train.metrics.trackers import check_tracker, start_mirror
from sepllm_train.model.pattern import AUTO
from sepllm_train.training import checkpoint, run_folder
from sepllm_train.training.compilation import Compilation
from sepllm_train.training.guards import Guards
from sepllm_train.training.initial_weights import find_initial_weights, initial_record, load_initial_weights
from sepllm_train.training.loop import Loop
from sepllm_train.training.out_of_memory import MemoryAdvice
from sepllm_train.training.report import Facts, derive, start_lines
from sepllm_train.training.schedules import StepSchedule, schedule_of
from sepllm_train.training.setup import build_training
from sepllm_train.training.signals import stop_on_signals
from sepllm_train.training.state import TrainState
from sepllm_train.training.step import Stepper
from sepllm_train.training.tracked_facts import run_facts
from sepllm_train.training.watchdog import Watchdog


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the model is built. `config` names the classes that separators=auto chose."""

    config: Config
    choice: ClassChoice | None
    steps: StepSchedule
    corpus: Corpus
    files: DataFiles
    dataset: Dataset
    validation: dict[str, Dataset]
    facts: Facts
    entry: run_folder.Entry
    identity: dict[str, Any]
    schedule: dict[str, Any]
    # Checkpoint of init_from; None without one, and when the run continues from a checkpoint of its own.
    initial: Path | None

    @property
    def recorded_identity(self) -> dict[str, Any]:
        """What checkpoints and run.json have on record: the identity, and data of earlier steps if there was other."""
        earlier = self.entry.earlier_data
        return {**self.identity, **({checkpoint.EARLIER_DATA: earlier} if earlier else {})}


def dry_run(config: Config, world_size: int, device: torch.device) -> None:
    """Check everything a run would check and print its derived numbers."""
    _prepare(config, world_size, device)
    say(f"dry run: the configuration is sound for a world of size {world_size}; nothing was trained.")


def train(config: Config, launch: Launch, device: torch.device) -> Interrupted | None:
    """Train. Every rank calls it inside the process grid. Gives why it ended early, if a signal made it."""
    prepared = _prepare(config, launch.world_size, device)
    config = prepared.config
    folder = prepared.entry.folder
    lock = together(lambda: run_folder.claim(folder) if launch.main else None)
    run_folder.check_shared(folder)
    entry = run_folder.settle_anew(config, prepared.identity, prepared.schedule, prepared.entry)
    prepared = replace(prepared, entry=entry)
    if launch.main:
        run_folder.tidy(entry)
    watchdog = Watchdog(folder, config.training.hang_seconds, launch.rank, launch.world_size)
    memory = MemoryAdvice(config, prepared.facts, launch.world_size, device)
    with stop_on_signals() as stop, watchdog, memory, Compilation(watchdog) as compilation:
        guards = Guards(stop, watchdog, prepared.files, compilation)
        interrupted = _train(config, prepared, guards, memory, launch, device)
    if lock is not None:
        lock.close()
    return interrupted


def _train(
    config: Config, prepared: Prepared, guards: Guards, memory: MemoryAdvice, launch: Launch, device: torch.device
) -> Interrupted | None:
    """Train in a run folder that is ours, and record in run.json how it ended."""
    folder, facts = prepared.entry.folder, prepared.facts
    # Drawing weights takes a large model minutes, and those of a checkpoint take their place.
    drawn = prepared.entry.checkpoint is None and prepared.initial is None
    training = build_training(config, facts.vocabulary, device, draw=drawn)
    stepper = Stepper(config, prepared.steps.base, training, device)
    state = TrainState()
    if prepared.entry.checkpoint is not None:
        guards.watchdog.beat("the loading of the checkpoint")
        state = checkpoint.load(prepared.entry.checkpoint, training)
        stored = checkpoint.read_state(prepared.entry.checkpoint)["identity"]
        if prepared.entry.earlier_data != stored.get(checkpoint.EARLIER_DATA, []):
            # Gradients of other text are of another size, which is no spike.
            state.recent_norms.clear()
        say(f"resumed from {prepared.entry.checkpoint}: {state.tokens:,} tokens, {duration(state.seconds)} trained")
    elif prepared.initial is not None:
        guards.watchdog.beat("the loading of the weights")
        load_initial_weights(prepared.initial, training)
        say(f"weights of {prepared.initial}")
    run = run_record(config, prepared, launch.world_size, device)
    metrics = bad_steps = mirror = None
    if launch.main:
        run_folder.describe(folder, config, run)
        metrics, bad_steps = (MetricsLog(folder / name) for name in ("metrics.jsonl", "bad_steps.jsonl"))
        for log in (metrics, bad_steps):
            log.rewind(state.step if prepared.entry.checkpoint is not None else -1)
        told = partial(run_facts, config, run, folder, prepared.corpus, facts)
        mirror = start_mirror(config.logging, metrics, folder, config.name, told)
    dist.barrier()
    loop = Loop(
        config,
        facts,
        training,
        stepper,
        prepared.steps,
        state,
        guards=guards,
        metrics=metrics,
        bad_steps=bad_steps,
        run_folder=folder,
        identities={"identity": prepared.recorded_identity, "schedule": prepared.schedule},
        token_bytes=prepared.corpus.token_bytes,
        device=device,
    )

    def record(status: str) -> None:
        if launch.main:
            try:
                run_folder.write_run(folder, {**run, "status": status})
            except OSError as error:
                # How the run ended must not be hidden by a disk that is full.
                say(f"warning: {folder / 'run.json'} cannot be written ({error.strerror}): it does not say {status!r}.")
        if mirror is not None and status != "failed":
            mirror.close(status)

    try:
        with memory:
            loop.run(prepared.dataset, prepared.validation)
    except BaseException as error:
        if isinstance(error, UserError | RunStopped):
            record("failed")
            loop.saver.abandon()
        if mirror is not None:
            mirror.close("failed")
        raise
    if state.step < config.training.steps:
        record("interrupted")
        # A launcher ends the other ranks as soon as one has ended with a code of its own.
        dist.barrier()
        return _interrupted(guards.stop.name, state.step, loop.first_step, config.training.steps, folder)
    record("finished")
    say(f"finished: {folder}/metrics.jsonl, compare runs with `sepllm compare {folder} OTHER --output DIR`")
    return None


def _interrupted(signal: str | None, step: int, first_step: int, steps: int, folder: Path) -> Interrupted:
    """Why the run ends after `step` of `steps`; this process began after `first_step`. No `signal`: it went to another
    process."""
    stopped = f"{signal or 'a signal to another process'} stopped the run"
    if step == first_step:
        return Interrupted(
            f"{stopped} before step {step + 1} of {steps}, so there was nothing to save; the same command starts it "
            "again."
        )
    return Interrupted(
        f"{stopped} after step {step} of {steps}, which is saved in {folder}; the same command continues from there."
    )


def run_record(config: Config, prepared: Prepared, world_size: int, device: torch.device) -> dict[str, Any]:
    """Content of run.json. Runs are comparable when all of `comparable` agrees."""
    facts, corpus = prepared.facts, prepared.corpus
    return {
        "name": config.name,
        "identity": prepared.recorded_identity,
        "schedule": prepared.schedule,
        "origin": prepared.entry.origin,
        "initial_weights": initial_record(prepared.initial, prepared.entry.checkpoint),
        "parameters": facts.parameters,
        "steps": config.training.steps,
        "curriculum": curriculum_of(config) or None,
        "comparable": {
            "data": corpus.identity(),
            "tokenizer": corpus.tokenizer_sha256,
            "vocabulary": facts.vocabulary,
            "sequence_length": config.data.sequence_length,
            "seed_of_data_order": config.seed,
            "validation_fraction": config.data.validation_fraction,
            "validation_samples": config.training.validation_samples,
            **({"validation_data": corpus.validation_identity()} if corpus.validation else {}),
            **({"earlier_data": prepared.entry.earlier_data} if prepared.entry.earlier_data else {}),
        },
        "attention": {
            "pattern": config.attention.pattern,
            "initial_tokens": config.attention.initial_tokens,
            "window": config.attention.window,
            "window_choices": config.attention.window_choices,
            "separators": config.attention.separators,
            "placement": config.attention.placement,
            "keep_share": config.attention.keep_share,
            "full_layers": config.attention.full_layers,
            **({} if prepared.choice is None else {"auto": prepared.choice.record()}),
        },
        "backends": facts.backends,
        "flops_per_token": facts.flops_per_token,
        "devices": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "world_size": world_size,
    }


def _prepare(config: Config, world_size: int, device: torch.device) -> Prepared:
    """Open the data, check the run folder, print the derived numbers. Raises UserError."""
    together(lambda: check_tracker(config.logging) if dist.get_rank() == 0 else None)
    if config.attention.separators != AUTO:
        # A mistake is told before the sample corpus is made.
        schedule_of(config)
    corpus = open_corpus_together(config.data)
    config, choice = settle_separators(config, corpus)
    steps = schedule_of(config)
    files = DataFiles(corpus)
    if config.model.vocabulary is not None and config.model.vocabulary < corpus.vocabulary:
        raise UserError(
            f"model.vocabulary={config.model.vocabulary} is smaller than the {corpus.vocabulary} entries of the "
            f"tokenizer of {corpus.sources[0].prefix}: raise it, or leave it null to take the tokenizer's."
        )
    vocabulary = config.model.vocabulary or corpus.vocabulary
    tokenizer, validated = corpus.tokenizer_sha256, corpus.validation_identity()
    identity = checkpoint.identity(config, vocabulary, corpus.identity(), tokenizer, validated)
    schedule = checkpoint.schedule_identity(config)
    entry = run_folder.settle(config, identity, schedule)
    # A run that goes on has no more need of them: they may be gone.
    initial = together(lambda: find_initial_weights(config, identity) if entry.checkpoint is None else None)
    dataset, validation = build_datasets(config, corpus)
    facts = derive(config, steps, corpus, dataset, world_size, device)
    say(optional_packages())
    splits = source_splits(corpus, dataset, validation)
    for line in start_lines(config, corpus, splits, facts, world_size, device):
        say(line)
    if choice is not None:
        say(str(choice))
    return Prepared(
        config, choice, steps, corpus, files, dataset, validation, facts, entry, identity, schedule, initial
    )

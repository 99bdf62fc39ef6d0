"""A run from its checked configuration to its last checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from sepllm_train.base.console import duration, fold, say
from sepllm_train.base.errors import Interrupted, RunStopped, UserError
from sepllm_train.config.compatibility import EARLIER_DATA
from sepllm_train.config.present import finished_advice, finished_run
from sepllm_train.config.schema import Config
from sepllm_train.distributed.collectives import on_all_ranks
from sepllm_train.distributed.launch import Launch
from sepllm_train.training import checkpoint, run_folder
from sepllm_train.training.console_lines import processes
from sepllm_train.training.evaluator import Evaluator, Tasks
from sepllm_train.training.forecast import forecast
from sepllm_train.training.guards import Compilation, Guards
from sepllm_train.training.initial_weights import load_initial_weights
from sepllm_train.training.live_run import LiveRun
from sepllm_train.training.loop import Loop
from sepllm_train.training.out_of_memory import MemoryAdvice
from sepllm_train.training.prepare import Prepared, prepare
from sepllm_train.training.run_record import Journal
from sepllm_train.training.setup import build_training
from sepllm_train.training.signals import stop_on_signals
from sepllm_train.training.state import TrainState
from sepllm_train.training.step import Stepper
from sepllm_train.training.step_logger import StepLogger
from sepllm_train.training.validator import Validator
from sepllm_train.training.watchdog import Watchdog


def dry_run(config: Config, world_size: int, device: torch.device, tasks: Tasks | None = None) -> None:
    """Check everything a run would check, and print its derived numbers and whether it fits this machine.

    Under the name of a finished run it is one under another name, which the run itself would need.
    """
    taken = finished_run(config)
    prepared = prepare(
        config if taken is None else replace(config, name=run_folder.free_name(config)), world_size, device
    )
    _prepare_tasks(tasks, prepared)
    lines, fits = forecast(prepared, world_size, device)
    for line in lines:
        say(fold(line))
    if taken is not None:
        say(fold(f"note: {finished_advice(taken)}."))
    but = "" if fits else ", but it does not fit this machine"
    say(f"dry run: the checks of a run on {processes(world_size)} passed{but}; nothing was trained.")


def train(config: Config, launch: Launch, device: torch.device, tasks: Tasks | None = None) -> Interrupted | None:
    """Train, and evaluate on `tasks`. Every rank calls it inside the process grid. Returns the reason when a signal
    ended it early."""
    prepared = prepare(config, launch.world_size, device)
    _prepare_tasks(tasks, prepared)
    config = prepared.config
    folder = prepared.entry.folder
    lock = on_all_ranks(lambda: run_folder.claim(folder) if launch.main else None)
    run_folder.check_shared(folder)
    entry = run_folder.settle_anew(config, prepared.identity, prepared.schedule, prepared.entry)
    prepared = replace(prepared, entry=entry)
    if launch.main:
        run_folder.tidy(entry)
    watchdog = Watchdog(folder, config.training.hang_seconds, launch.rank, launch.world_size)
    memory = MemoryAdvice(config, prepared.facts, launch.world_size, device)
    with stop_on_signals() as stop, watchdog, memory, Compilation(watchdog) as compilation:
        guards = Guards(stop, watchdog, prepared.files, compilation)
        interrupted = _train(prepared, guards, memory, launch, device, tasks)
    if lock is not None:
        lock.close()
    return interrupted


def _prepare_tasks(tasks: Tasks | None, prepared: Prepared) -> None:
    """Check on every rank that the run can be evaluated, and report on what it is. Raises UserError."""
    if tasks is not None:
        say(fold(on_all_ranks(lambda: tasks.prepare(prepared))))


def _train(
    prepared: Prepared,
    guards: Guards,
    memory: MemoryAdvice,
    launch: Launch,
    device: torch.device,
    tasks: Tasks | None = None,
) -> Interrupted | None:
    """Train in a run folder that is ours, and record in run.json how it ended."""
    live = _live_run(prepared, guards, device)
    resumed = None if prepared.entry.checkpoint is None else live.state.step
    journal = None
    if launch.main:
        journal = Journal(prepared, resumed, launch.world_size, device)
        guards.folder = journal.watch
    dist.barrier()
    loop = _loop(prepared, live, journal, tasks)
    try:
        with memory:
            loop.run(prepared.dataset)
            # The last checkpoint takes its time.
            loop.check_folder()
    except BaseException as error:
        if isinstance(error, UserError | RunStopped):
            if journal is not None:
                journal.write_status("failed")
            loop.saver.abandon()
        if journal is not None:
            journal.close_mirror("failed")
        raise
    step, steps = live.state.step, live.config.training.steps
    if journal is not None:
        journal.end("finished" if loop.complete else "interrupted")
    if not loop.complete:
        # A launcher ends the other ranks as soon as one has ended with a code of its own.
        dist.barrier()
        return _interrupted(guards.stop.name, step, loop.first_step, steps, live.folder)
    say(
        fold(
            f"finished: {live.folder}/metrics.jsonl | compare runs with sepllm compare {live.folder} OTHER --output DIR"
        )
    )
    return None


def _live_run(prepared: Prepared, guards: Guards, device: torch.device) -> LiveRun:
    """Model, optimizer and counters at the step that the run begins with."""
    config, resumed = prepared.config, prepared.entry.checkpoint
    # Drawing weights takes a large model minutes, and those of a checkpoint take their place.
    drawn = resumed is None and prepared.initial is None
    training = build_training(config, prepared.facts.vocabulary, device, draw=drawn)
    stepper = Stepper(config, prepared.steps.base, training, device)
    state = TrainState()
    if resumed is not None:
        guards.watchdog.beat("the loading of the checkpoint")
        state = checkpoint.load(resumed, training)
        if prepared.entry.earlier_data != checkpoint.read_state(resumed)["identity"].get(EARLIER_DATA, []):
            # Gradients of other text are of another size, which is no spike.
            state.recent_norms.clear()
        say(f"resumed from {resumed}: {state.tokens:,} tokens, {duration(state.seconds)} trained")
    elif prepared.initial is not None:
        guards.watchdog.beat("the loading of the weights")
        load_initial_weights(prepared.initial, training)
        say(f"weights of {prepared.initial}")
    return LiveRun(
        config, prepared.entry.folder, prepared.facts, prepared.steps, training, stepper, state, guards, device
    )


def _loop(prepared: Prepared, live: LiveRun, journal: Journal | None, tasks: Tasks | None) -> Loop:
    """The loop of a run with its saver, logger, validation and evaluation."""
    settings = live.config.training
    saver = checkpoint.Saver(
        live.folder,
        live.training,
        {"identity": prepared.recorded_identity, "schedule": prepared.schedule},
        keep=settings.keep_checkpoints,
        kept=settings.keeps,
        background=settings.async_checkpoint,
    )
    logs = (None, None) if journal is None else (journal.metrics, journal.bad_steps)
    logger = StepLogger(live, *logs)
    validator = Validator(live, logger, prepared.validation, prepared.corpus.token_bytes)
    return Loop(live, saver, logger, validator, Evaluator(live, logger, tasks))


def _interrupted(signal: str | None, step: int, first_step: int, steps: int, folder: Path) -> Interrupted:
    """Message of a run that a signal ends after `step` of `steps`; this process began after `first_step`. No `signal`:
    it went to another process."""
    stopped = f"{signal or 'a signal to another process'} stopped the run"
    if step == steps:
        return Interrupted(
            f"{stopped} after its last step, which is saved in {folder}, and before the evaluation; the same command "
            "evaluates."
        )
    if step == first_step:
        return Interrupted(
            f"{stopped} before step {step + 1} of {steps}, so there was nothing to save; the same command starts it "
            "again."
        )
    return Interrupted(
        f"{stopped} after step {step} of {steps}, which is saved in {folder}; the same command continues from there."
    )

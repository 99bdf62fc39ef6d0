"""Checks that need more than one group of the configuration, before any process group or GPU work."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from typing import Any

from data_prep.separators import CLASSES, NAMED_SETS
from sepllm_train.base.errors import UserError
from sepllm_train.config.curriculum import batch_phases, batch_schedule_of, curriculum_phases, schedule_position
from sepllm_train.config.param_groups import check_param_groups
from sepllm_train.config.schema import AttentionConfig, Config, ParallelConfig, require


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Replicas of the model: world size / (TP x PP x CP). Raises UserError when that is not whole."""
    grid = parallel.processes
    require(
        world_size % grid == 0,
        f"a world of size {world_size} cannot be split into parallel.tensor={parallel.tensor} x "
        f"parallel.pipeline={parallel.pipeline}"
        + (f" x parallel.context={parallel.context}" if parallel.context > 1 else "")
        + f": start a multiple of {grid} processes (--nproc of sepllm pretrain).",
    )
    return world_size // grid


def validate(config: Config, world_size: int) -> None:
    """Check the groups against each other for a run of `world_size` processes.

    Raises one UserError that tells of every mistake there is.
    """
    mistakes = [message for holds, message in _checks(config, world_size) if not holds]
    if len(mistakes) == 1:
        raise UserError(mistakes[0])
    if mistakes:
        raise UserError("\n- ".join((f"{len(mistakes)} settings do not fit:", *mistakes)))


def _checks(config: Config, world_size: int) -> Iterator[tuple[bool, str]]:
    """(whether it holds, what to tell otherwise) of every condition."""
    yield from _classes(config.attention)
    yield (
        not config.attention.restart_positions or config.model.rotary_fraction > 0,
        "attention.restart_positions=true restarts rotary positions, of which model.rotary_fraction=0 has none.",
    )
    yield from _grid(config)
    yield from _curriculum(config)
    yield from _batch_schedule(config)
    yield from _sequence(config)
    yield from _batch(config, world_size)
    yield from _schedule(config)
    yield from check_param_groups(config)
    yield from _profile(config, world_size)
    yield from _evaluation(config)
    yield from _node()


def _classes(attention: AttentionConfig) -> Iterator[tuple[bool, str]]:
    """The names of separator classes; the rest of attention.separators is checked where it is resolved."""
    listed = attention.separators if isinstance(attention.separators, list) else [attention.separators]
    names = [name for entry in listed for name in _names(entry)]
    known = [entry.name for entry in CLASSES] + [*NAMED_SETS, "auto"]
    unknown = next((name for name in names if attention.pattern == "sep" and name not in known), None)
    near = difflib.get_close_matches(unknown, known, n=1) if unknown else []
    yield (
        unknown is None,
        f"attention.separators: unknown separator class {unknown!r}"
        + (f" (did you mean {near[0]}?)" if near else "")
        + f"; known are {', '.join(known)}.",
    )


def _names(entry: Any) -> list[str]:
    """Names of classes in an entry of attention.separators."""
    inner = entry.get("classes") if isinstance(entry, dict) else entry
    return [name for name in (inner if isinstance(inner, list) else [inner]) if isinstance(name, str)]


def _node() -> Iterator[tuple[bool, str]]:
    """Processes and GPUs of this node. One process is never too many, and needs no torch to know."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local > 1:
        import torch

        gpus = torch.cuda.device_count()
        yield (
            gpus == 0 or local <= gpus,
            f"{local} processes were started on a node of {gpus} GPUs: one each is needed.",
        )


def _grid(config: Config) -> Iterator[tuple[bool, str]]:
    """Model dimensions against tensor and pipeline sizes."""
    model, parallel = config.model, config.parallel
    for key in ("heads", "kv_heads", "ffn"):
        value = getattr(model, key)
        yield (
            value is None or value % parallel.tensor == 0,
            f"parallel.tensor={parallel.tensor} must divide model.{key}={value}.",
        )
    stages = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if parallel.uneven:
        yield (
            bool(parallel.stage_layers(model.layers)),
            f"model.layers={model.layers} cannot be shared out over parallel.pipeline={parallel.pipeline} stages with "
            f"parallel.first_stage_layers={parallel.first_stage_layers} and parallel.last_stage_layers="
            f"{parallel.last_stage_layers}: the other stages must get as many layers each, at least one.",
        )
    else:
        yield (
            model.layers % stages == 0,
            f"model.layers={model.layers} must be a multiple of parallel.pipeline x parallel.virtual_pipeline = "
            f"{stages}.",
        )
    yield (
        not (model.tied_embeddings and parallel.virtual_pipeline not in (None, 1)),
        "model.tied_embeddings=true cannot be used with parallel.virtual_pipeline.",
    )


def _curriculum(config: Config) -> Iterator[tuple[bool, str]]:
    """The phases of a curriculum against the sequences and the length of the run."""
    *early, last = curriculum_phases(config)
    lengths = [phase.length for phase in early]
    total = config.training.steps
    yield (
        not early or early[-1].last < total,
        f"training.curriculum takes {last.first - 1} steps, and training.steps={total} must leave some for "
        f"data.sequence_length={last.length}.",
    )
    yield (
        all(phase.steps >= 1 for phase in early),
        f"training.curriculum has a phase of less than one of training.steps={total}: give it a larger share.",
    )
    yield (
        all(length >= 1 and last.length % length == 0 for length in lengths) and last.length not in lengths,
        f"training.curriculum has the lengths {lengths}: each must be smaller than data.sequence_length={last.length} "
        "and divide it.",
    )
    yield (
        lengths == sorted(set(lengths)),
        f"training.curriculum has the lengths {lengths}: they must rise from phase to phase.",
    )


def _batch_schedule(config: Config) -> Iterator[tuple[bool, str]]:
    """The phases of a batch schedule against the length of the run."""
    *early, last = batch_phases(config)
    batches = [phase.batch for phase in early]
    steps, start = config.training.steps, config.optim.schedule_start
    taken = last.first - 1
    yield (
        batches == sorted(set(batches)) and max(batches, default=1) <= last.batch,
        f"training.batch_schedule has the batches {batches}: they must rise from phase to phase, to at most "
        f"training.global_batch={last.batch}.",
    )
    yield (
        not early or taken < steps or (taken == steps and batches[-1] == last.batch),
        f"training.batch_schedule takes {taken} steps, and training.steps={steps} must leave some for "
        f"training.global_batch={last.batch}.",
    )
    yield (
        start == 0 or not batch_schedule_of(config),
        f"optim.schedule_start={start} counts steps of training.global_batch={last.batch}, and "
        "training.batch_schedule has others: leave one of them out.",
    )


def _sequence(config: Config) -> Iterator[tuple[bool, str]]:
    """The parts into which sequences are cut."""
    parallel = config.parallel
    context, tensor = parallel.context, parallel.tensor
    *early, last = curriculum_phases(config)
    named = [(f"the length {phase.length} of training.curriculum", phase.length) for phase in early]
    for name, length in [*named, (f"data.sequence_length={last.length}", last.length)]:
        yield (
            context == 1 or length % (2 * context) == 0,
            f"parallel.context={context} cuts sequences into {2 * context} equal chunks: {name} "
            f"must be a multiple of {2 * context}.",
        )
        yield (
            not parallel.sequence or length % (context * tensor) == 0,
            f"parallel.sequence=true needs {name} to be a multiple of "
            + (f"parallel.context={context} x " if context > 1 else "")
            + f"parallel.tensor={tensor}.",
        )


def _batch(config: Config, world_size: int) -> Iterator[tuple[bool, str]]:
    """Processes and micro-batches."""
    try:
        replicas = data_parallel_size(config.parallel, world_size)
    except UserError as error:
        yield False, str(error)
        return
    micro, chunks = config.training.micro_batch, config.parallel.virtual_pipeline or 1
    *early, last = batch_phases(config)
    scheduled = [(f"batch={one.batch} of training.batch_schedule (from step {one.first:,} on)", one) for one in early]
    for name, phase in [*scheduled, (f"training.global_batch={last.batch}", last)]:
        micro_batches, rest = divmod(phase.batch, micro * replicas)
        yield (
            rest == 0,
            f"{name} must be a multiple of training.micro_batch={micro} x {replicas} data-parallel replicas.",
        )
        even = chunks == 1 or micro_batches % config.parallel.pipeline == 0
        yield (
            even or rest > 0,
            f"parallel.virtual_pipeline={chunks} needs the {micro_batches} micro-batches of a step"
            + (f" with {name}" if phase is not last else "")
            + f" to be a multiple of parallel.pipeline={config.parallel.pipeline}.",
        )
        if rest or not even:
            # The first steps that do not fit are enough.
            return


def _profile(config: Config, world_size: int) -> Iterator[tuple[bool, str]]:
    """The steps and processes that are profiled."""
    steps, ranks = config.logging.profile, config.logging.profile_ranks
    yield (
        steps is None or steps[1] <= config.training.steps,
        f"logging.profile={steps} ends after the last step: training.steps={config.training.steps}.",
    )
    yield (
        steps is None or max(ranks, default=0) < world_size,
        f"logging.profile_ranks={ranks}: the {world_size} processes are numbered from 0 to {world_size - 1}.",
    )


def _evaluation(config: Config) -> Iterator[tuple[bool, str]]:
    """Tasks that score the model while it trains, as one of transformers."""
    attention, none = config.attention, not config.evaluation.tasks
    yield (
        none or attention.placement == "natural",
        f"evaluation.tasks cannot be scored with attention.placement={attention.placement}: which tokens are "
        "separators depends on their place in the training data, not on the tokens.",
    )
    yield (
        none or attention.sink == "none",
        f"evaluation.tasks cannot be scored with attention.sink={attention.sink}: no class of transformers has this "
        "sink in its softmax.",
    )


def _schedule(config: Config) -> Iterator[tuple[bool, str]]:
    """The learning rate's phases against the length of the run."""
    optim = config.optim
    steps = optim.schedule_steps or config.training.steps
    name = "training.steps" if optim.schedule_steps is None else "optim.schedule_steps"
    yield (
        optim.schedule_start == 0 or config.init_from is not None,
        f"optim.schedule_start={optim.schedule_start} goes on with another run's schedule: add init_from=RUN, the run "
        "whose weights this one begins with.",
    )
    yield (
        optim.schedule_start == 0 or optim.schedule_start + config.training.steps <= steps,
        f"optim.schedule_start={optim.schedule_start} and training.steps={config.training.steps} go beyond the "
        f"schedule's {name}={steps}: give optim.schedule_steps, the length of the run that is continued.",
    )
    if optim.warmup_steps is None:
        return
    inside = 0 <= optim.warmup_steps <= steps
    yield inside, f"optim.warmup_steps={optim.warmup_steps} must lie between 0 and {name}={steps}."
    end = schedule_position(config, steps)
    decay = optim.decay_fraction * end if optim.schedule == "wsd" else 0
    yield (
        not inside or schedule_position(config, optim.warmup_steps) + decay <= end,
        f"optim.warmup_steps={optim.warmup_steps} reach into the decay, the last optim.decay_fraction="
        f"{optim.decay_fraction} of {name}={steps}.",
    )

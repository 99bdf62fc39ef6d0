"""Advice for a run that ran out of memory: the keys that lower the need, and by how much."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from sepllm_train.base.errors import RankError, UserError
from sepllm_train.config.schema import Config
from sepllm_train.config.validate import data_parallel_size, validate
from sepllm_train.metrics.memory import memory_estimate
from sepllm_train.model.build import padded_vocabulary
from sepllm_train.training.facts import Facts

# Share of the free memory that a setting may be estimated to take: the rest is for what the estimate leaves out.
HEADROOM = 0.9
# What torch and the C library say on a CPU when memory is not available.
_CPU_FAILURES = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc", "could not create a memory")


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on `device`.

    On a CPU what the machine has available, shared among the processes of this node, or less where a control group or
    an address-space limit (RLIMIT_AS) ends sooner.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    bounds = [psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        bounds.append(limit - psutil.Process().memory_info().vms)
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no control group, or one without a limit
        bounds.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(bounds))


class MemoryAdvice:
    """A block that may run out of memory: it then raises a RankError with the settings to change.

    The memory that is free when this is made counts as what the run may take. One object serves several blocks, also
    one inside another.
    """

    def __init__(self, config: Config, facts: Facts, world_size: int, device: torch.device) -> None:
        self.config, self.facts, self.world_size, self.device = config, facts, world_size, device
        self.free = free_memory(device)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and is_out_of_memory(error):
            raise RankError(advice(self.config, self.facts, self.world_size, self.device, self.free)) from None


def is_out_of_memory(error: BaseException) -> bool:
    """True when an allocation failed, on a GPU or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_FAILURES)


def advice(config: Config, facts: Facts, world_size: int, device: torch.device, free: int) -> str:
    """Message for a run of which `free` bytes were not enough: its needs, and settings estimated to fit."""
    need = facts.memory
    parts = ", ".join(f"{key} {_gib(need[key])}" for key in ("weights", "gradients", "optimizer", "activations"))
    found = (
        f"out of memory: the run is estimated to need {_gib(need['total'])} on each process ({parts}), and "
        f"{_gib(free)} were free when it began"
    )
    return f"{found}: {remedy(config, facts, world_size, device, free)}."


def remedy(config: Config, facts: Facts, world_size: int, device: torch.device, free: int) -> str:
    """Settings with which a run is estimated to fit into `free` bytes on each process."""
    limit = HEADROOM * min(free, facts.memory["total"])

    def size(variant: Config) -> int:
        return _total(variant, facts, world_size, device)

    def shown(change: str, variant: Config) -> str:
        processes = variant.parallel.processes
        where = f" on {processes} processes" if processes > world_size else ""
        return f"{change}{where} ({_gib(size(variant))})"

    alone = []
    for lever in LEVERS:
        change, variant = _mildest(lever(config, world_size), size, limit) or ("", config)
        if change and size(variant) <= limit:
            alone.append(shown(change, variant))
    if alone:
        return f"set {' or '.join(alone)}, which should fit"
    changes: list[str] = []
    variant = config
    for lever in LEVERS:
        change, changed = _mildest(lever(variant, world_size), size, limit) or ("", variant)
        if change and size(changed) < size(variant):
            changes, variant = [*changes, change], changed
    together = shown(" ".join(changes), variant)
    if changes and size(variant) <= limit:
        return f"set {together}, which should fit together"
    most = f"not even {together} would fit" if changes else "no other batch, recomputation or layout needs less"
    return f"{most}, so take a smaller model, a shorter data.sequence_length or more processes"


def _mildest(
    variants: list[tuple[str, Config]], size: Callable[[Config], int], limit: float
) -> tuple[str, Config] | None:
    """The first of `variants` that takes no more than `limit` bytes, else the one that takes least; None of none."""
    fitting = (variant for variant in variants if size(variant[1]) <= limit)
    return next(fitting, min(variants, key=lambda variant: size(variant[1]), default=None))


def _micro_batches(config: Config, world_size: int) -> list[tuple[str, Config]]:
    """Smaller micro-batches, the largest first: those that divide the batch of a step."""
    batch = config.training.global_batch
    small = [number for number in range(1, math.isqrt(batch) + 1) if batch % number == 0]
    divisors = sorted({*small, *(batch // number for number in small)}, reverse=True)
    return [
        variant
        for micro in divisors
        if micro < config.training.micro_batch
        for variant in _allowed(config, world_size, "training", micro_batch=micro)
    ]


def _recomputation(config: Config, world_size: int) -> list[tuple[str, Config]]:
    """More recomputation of activations, the cheapest first."""
    modes = ("none", "selective", "full")
    more = modes[modes.index(config.training.recompute) + 1 :]
    return [variant for mode in more for variant in _allowed(config, world_size, "training", recompute=mode)]


def _loss_chunks(config: Config, world_size: int) -> list[tuple[str, Config]]:
    """The loss over chunks of tokens, the largest first."""
    tokens = config.training.micro_batch * config.data.sequence_length // config.parallel.context
    now = config.training.loss_chunk or tokens
    sizes = [size for size in (8192, 4096, 2048, 1024) if size < min(now, tokens)]
    return [variant for size in sizes for variant in _allowed(config, world_size, "training", loss_chunk=size)]


def _layouts(config: Config, world_size: int) -> list[tuple[str, Config]]:
    """Other layouts of the processes, the least change first; on more processes where there are too few."""
    variants = []
    if not config.parallel.sharded_optimizer and world_size > config.parallel.processes:
        variants += _allowed(config, world_size, "parallel", sharded_optimizer=True)
    for factor in (2, 4, 8):
        for key in ("tensor", "context", "pipeline"):
            size = getattr(config.parallel, key) * factor
            variants += _allowed(config, world_size, "parallel", **{key: size})
    return variants


LEVERS = (_micro_batches, _recomputation, _loss_chunks, _layouts)


def _allowed(config: Config, world_size: int, group: str, **changes: Any) -> list[tuple[str, Config]]:
    """[(override, configuration)] of a change that the checks of a run let through, on at least `world_size`
    processes; else nothing."""
    try:
        variant = replace(config, **{group: replace(getattr(config, group), **changes)})
        validate(variant, max(world_size, variant.parallel.processes))
    except UserError:
        return []
    return [(" ".join(f"{group}.{key}={str(value).lower()}" for key, value in changes.items()), variant)]


def _total(config: Config, facts: Facts, world_size: int, device: torch.device) -> int:
    """Estimated bytes of each process with the data of `facts`."""
    return memory_estimate(
        config,
        padded_vocabulary(facts.vocabulary, config.parallel.tensor),
        replicas=data_parallel_size(config.parallel, max(world_size, config.parallel.processes)),
        attended_share=facts.phases[-1].most_attended,
        device=device.type,
    )["total"]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"

"""Forecast of a dry run: whether memory and disk of this machine are enough, and the least time that it takes."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import torch

from sepllm_train.base.console import duration, flop_count
from sepllm_train.config.schema import Config
from sepllm_train.metrics.flops import peak_tflops
from sepllm_train.training.facts import Facts
from sepllm_train.training.out_of_memory import free_memory, remedy
from sepllm_train.training.prepare import Prepared

GIB = 2**30
# Size and seconds of the matrix products that measure a CPU.
_MEASURED = 1024
_MEASURE_SECONDS = 0.25


def forecast(prepared: Prepared, world_size: int, device: torch.device) -> tuple[list[str], bool]:
    """Lines about memory, disk and time, and whether the run fits this machine."""
    config, facts = prepared.config, prepared.facts
    memory, fits = memory_line(config, facts, world_size, device)
    disk, stored = disk_line(config, facts)
    return [memory, disk, time_line(config, facts, world_size, device)], fits and stored


def memory_line(config: Config, facts: Facts, world_size: int, device: torch.device) -> tuple[str, bool]:
    """Estimated need against what is free here, and whether it is enough.

    A dry run in one process stands for all of them: on a CPU they share the memory of this machine.
    """
    free, need = free_memory(device), facts.memory["total"]
    if device.type == "cpu" and "RANK" not in os.environ:
        free //= world_size
    where = "on this GPU" if device.type == "cuda" else "on this machine" + (" for each" if world_size > 1 else "")
    told = f"memory: {need / GIB:.2f} GiB needed on each process, estimated, and {free / GIB:.2f} GiB free {where}"
    if need <= free:
        return told, True
    return f"warning: {told}: {remedy(config, facts, world_size, device, free)}", False


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """Bytes of a checkpoint: weights, Adam's two moments and, in half precision, the fp32 weights."""
    return parameters * (12 if config.training.precision == "fp32" else 14)


def disk_line(config: Config, facts: Facts) -> tuple[str, bool]:
    """Size of the checkpoints against the free space of run_root, and whether it is enough."""
    training = config.training
    each = checkpoint_bytes(config, facts.parameters)
    written = training.steps // training.checkpoint_interval if training.checkpoint_interval else 0
    # The newest ones, and the next while it is written; those of keep_every and checkpoint_steps stay besides.
    most = min(training.keep_checkpoints, written + 1) + (written > 0)
    most += training.kept()
    folder = Path(config.run_root).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    told = (
        f"checkpoints: {each / GIB:.2f} GiB each, at most {most} at a time = {most * each / GIB:.2f} GiB, and "
        f"{free / GIB:.2f} GiB free in {config.run_root}"
    )
    if most * each <= free:
        return told, True
    return f"warning: {told}: free some, lower training.keep_checkpoints, or choose another run_root=", False


def time_line(config: Config, facts: Facts, world_size: int, device: torch.device) -> str:
    """Least time of the run: that of its FLOPs at the peak of the GPUs, or at the speed of products of matrices on this
    CPU, which all processes share."""
    work = facts.flops_per_token["flops/model"] * facts.tokens
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = config.logging.peak_tflops or peak_tflops(name)
        if peak is None:
            return f"time: not known, for the peak of {name} is not: give logging.peak_tflops"
        seconds = work / (peak * 1e12 * world_size)
        whole, part = duration(seconds), duration(seconds / 0.4)
        return f"time: at least {whole}, at the peak of {world_size} GPUs; {part} at 40% of it"
    speed = cpu_speed()
    return (
        f"time: at least {duration(work / speed)}, at the {flop_count(speed)}/s of bare products of matrices on "
        "this CPU; the lines of the steps tell how long it is"
    )


def cpu_speed() -> float:
    """FLOP/s of fp32 products of matrices in this process."""
    left, right = torch.ones(_MEASURED, _MEASURED), torch.ones(_MEASURED, _MEASURED)
    left @ right
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < _MEASURE_SECONDS:
        left @ right
        products += 1
    return 2 * _MEASURED**3 * products / (time.perf_counter() - began)

"""Start of the process grid: torch.distributed, megatron-core's parallel groups, device, seeds."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sepllm_train.base.quiet import quiet
from sepllm_train.config.schema import Config, ParallelConfig, require
from sepllm_train.distributed.collectives import not_all_arrived
from sepllm_train.distributed.context import ContextGroup
from sepllm_train.distributed.processes import end_with_parent

with quiet():
    from megatron.core import parallel_state, tensor_parallel


@dataclass(frozen=True)
class Launch:
    """Place of this process in the environment that torchrun sets; one process alone without it."""

    rank: int
    world_size: int
    local_rank: int
    by_torchrun: bool

    @property
    def main(self) -> bool:
        """True for the process that talks to the user."""
        return self.rank == 0


ALONE = Launch(rank=0, world_size=1, local_rank=0, by_torchrun=False)


def launch_from_environment() -> Launch:
    """Read RANK, WORLD_SIZE and LOCAL_RANK."""
    return Launch(
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        by_torchrun="RANK" in os.environ,
    )


def device_of(launch: Launch) -> torch.device:
    """The GPU of this process, or the CPU where there is none."""
    return torch.device("cuda", launch.local_rank) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def process_grid(config: Config, launch: Launch) -> Iterator[torch.device]:
    """Set up the grid of `config.parallel` for the duration of the block and give this process's device.

    NCCL carries GPU tensors and gloo CPU tensors; without a GPU megatron-core's CUDA calls are met by
    `sepllm_train.distributed.cpu`.
    """
    device = device_of(launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with _process_group(launch, backend, config.parallel.timeout_seconds), model_parallel(config, device):
        yield device


@contextmanager
def alone(config: Config | None = None) -> Iterator[torch.device]:
    """One process as megatron-core's whole grid, taken down in any case; a grid of one that is set up is used."""
    if parallel_state.model_parallel_is_initialized():
        require(dist.get_world_size() == 1, "an analysis runs in one process: start it without torchrun.")
        yield device_of(ALONE)
        return
    with process_grid(config or Config(), ALONE) as device:
        yield device


@contextmanager
def reading_group(launch: Launch) -> Iterator[None]:
    """Group of processes that only read data: the part of the grid that a dry run needs."""
    with _process_group(launch, "gloo", ParallelConfig.timeout_seconds):
        yield


@contextmanager
def _process_group(launch: Launch, backend: str, timeout_seconds: float) -> Iterator[None]:
    """torch.distributed's default group, alone without torchrun. Raises LostRank when others do not come in time."""
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if launch.by_torchrun:
        _end_with_launcher()
        try:
            dist.init_process_group(backend, timeout=timeout)
        except RuntimeError as error:
            raise not_all_arrived(error, launch.world_size, timeout_seconds) from None
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield
    except BaseException:
        # A rank that failed must end at once, not wait for the others in the shutdown. Alone there is none to wait for,
        # and a group that is left to the end of the process can abort that: its threads are still running.
        if launch.world_size == 1 and dist.is_initialized():
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _end_with_launcher() -> None:
    """Get SIGTERM when torchrun is gone, so that a killed one leaves no rank that trains on and holds the run folder.

    Linux alone has that; where it is not available, ranks end at the next checkpoint, for which they need the store.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


@contextmanager
def model_parallel(config: Config, device: torch.device) -> Iterator[None]:
    """Parallel groups and RNG state of megatron-core, inside torch.distributed's default group."""
    if device.type == "cpu":
        from sepllm_train.distributed import cpu

        cpu.install()
    try:
        _initialize(config)
        yield
    except BaseException:
        # As in _process_group: others are not waited for, and one process alone may continue.
        if not dist.is_initialized() or dist.get_world_size() == 1:
            parallel_state.destroy_model_parallel()
        raise
    parallel_state.destroy_model_parallel()


def _initialize(config: Config) -> None:
    """megatron-core's groups and random number generators."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        context_parallel_size=config.parallel.context,
        virtual_pipeline_model_parallel_size=virtual_stages(config),
        # Its groups do not take over the time-out of the default one; it makes a timedelta of any number.
        distributed_timeout_minutes=config.parallel.timeout_seconds / 60,
    )
    torch.manual_seed(config.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed)
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def context_group() -> ContextGroup | None:
    """The ranks that share this rank's sequences; None where each rank has its own."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return None
    rank, group = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_group()
    return ContextGroup(rank, size, group)


def virtual_stages(config: Config) -> int | None:
    """Model chunks per pipeline stage, None when the schedule is not interleaved."""
    chunks = config.parallel.virtual_pipeline
    return chunks if chunks is not None and chunks > 1 else None

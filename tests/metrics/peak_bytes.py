"""Peak bytes of tensors over two real training steps, in one process or by ranks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sepllm_train.config.schema import (
    AttentionConfig,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
)
from sepllm_train.data.loader import Batch
from sepllm_train.distributed.launch import launch_from_environment, process_grid
from sepllm_train.model.pattern import resolve_pattern

LENGTH = 256
PYTHIA = {"layers": 4, "hidden": 256, "heads": 4, "ffn": 1024}
PYTHIA14M = {"layers": 6, "hidden": 128, "heads": 4, "ffn": 512}
LLAMA = {
    "layers": 4,
    "hidden": 256,
    "heads": 8,
    "kv_heads": 2,
    "ffn": 704,
    "parallel_residual": False,
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "rotary_fraction": 1.0,
    "init": "normal",
}


def configuration(
    model: dict[str, Any],
    training: dict[str, Any],
    parallel: dict[str, Any] | None = None,
    pattern: str = "dense",
) -> Config:
    """A run on sequences of LENGTH tokens in micro-batches of two, one a step unless `training` says otherwise."""
    return Config(
        model=ModelConfig(**model),
        attention=AttentionConfig(pattern=pattern),
        data=DataConfig(sequence_length=LENGTH),
        parallel=ParallelConfig(**(parallel or {})),
        training=TrainingConfig(**({"global_batch": 2, "micro_batch": 2} | training)),
    )


class LiveBytes(TorchDispatchMode):
    """Follows every tensor that an operation returns until its memory is given back; `peak` is in bytes.

    torch's profiler sees the allocator itself, but not what another thread frees, and gloo's threads do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operation and count the memory it returned."""
        result = func(*args, **(kwargs or {}))
        fresh = False
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = self.live.get(storage._cdata)
                if reference is None or reference[0].expired() or reference[1] != storage.nbytes():
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    fresh = True
        if fresh:
            self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def measured_peak(config: Config, vocabulary: int, replicas: int, device: torch.device) -> int:
    """The most bytes that are allocated at one time while a model is built and trained for two steps."""
    with LiveBytes() as record:
        train_two_steps(config, vocabulary, replicas, device)
    return record.peak


def allocator_peak(config: Config, vocabulary: int, device: torch.device) -> int:
    """The same from the allocator's own record, in one process."""
    gc.collect()  # what an earlier model left behind must not be freed inside the record
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        train_two_steps(config, vocabulary, 1, device)
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    allocated = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        allocated += size
        peak = max(peak, allocated)
    return peak


def train_two_steps(config: Config, vocabulary: int, replicas: int, device: torch.device) -> None:
    """Build the model and train it; the second step has Adam's moments."""
    from sepllm_train.training.setup import build_training
    from sepllm_train.training.step import Stepper

    micro_batches = config.training.global_batch // (config.training.micro_batch * replicas)
    training = build_training(config, vocabulary, device)
    stepper = Stepper(config, resolve_pattern(config.attention, config.model.layers), training, device)
    for _ in range(2):
        batches = [random_batches(config, vocabulary, micro_batches) for _ in training.chunks]
        stepper.train(batches, micro_batches, lambda number: None)


def random_batches(config: Config, vocabulary: int, count: int) -> Iterator[Batch]:
    """Micro-batches of random tokens, 12% of them separators."""
    shape = (config.training.micro_batch, config.data.sequence_length)
    for _ in range(count):
        tokens = torch.randint(vocabulary, shape)
        classes = (torch.rand(shape) < 0.12).to(torch.uint8)
        start = torch.zeros(shape, dtype=torch.int32)
        yield {"tokens": tokens, "labels": tokens.clone(), "separator_class": classes, "document_start": start}


def peaks_of_layouts(layouts: list[dict[str, Any]], vocabulary: int) -> list[int]:
    """Peak of this rank in each layout ({model, training, parallel}); the layouts share the processes."""
    from megatron.core import parallel_state

    from sepllm_train.config.validate import data_parallel_size
    from sepllm_train.distributed.launch import model_parallel

    launch = launch_from_environment()
    peaks = []
    configs = [configuration(**layout) for layout in layouts]
    with process_grid(configs[0], launch) as device:
        parallel_state.destroy_model_parallel()
        for config in configs:
            replicas = data_parallel_size(config.parallel, launch.world_size)
            with model_parallel(config, device):
                peaks.append(measured_peak(config, vocabulary, replicas, device))
    return peaks

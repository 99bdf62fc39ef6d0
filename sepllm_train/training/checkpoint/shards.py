"""Shards of this rank in a checkpoint: model, optimizer and RNG state as parts of whole tensors.

Model and optimizer tensors carry the names and places that megatron-core gives them, which do not depend on the layout:
any tensor, pipeline, context and data parallelism can load what any other wrote. The optimizer's state is cut in the
same space, whether every replica holds all of it or each its part (`parallel.sharded_optimizer`), so that the two can
load each other's. megatron-core's own formats of the sharded one do not: without apex or Transformer Engine they lose
Adam's step count, and they are tied to the number of replicas.

Tensors are given as they are in memory: whoever saves copies them first, and loading writes into them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from torch import Tensor

from sepllm_train.training.muon import MuonAndAdam
from sepllm_train.training.setup import Training

Shards = dict[str, list[ShardedTensor]]
# Beginning of the name of the optimizer's fp32 copy of a weight in bf16 or fp16, before that of the weight.
MAIN = "optimizer.state.fp32_param."

# Tensors of the optimizer's state of a parameter: Adam's two, Muon's one.
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def layout() -> dict[str, int | str]:
    """Sizes of the process grid and the type of its devices, which have an RNG state of their own."""
    return {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
    }


def training_shards(training: Training) -> Shards:
    """Shards of model and optimizer by name, replicas included. Their tensors are those that are trained."""
    complete_state(training.optimizer)
    entries = _entries(training.modules)
    held = {id(part.model): part for part in _held(training.optimizer)}
    found: Shards = defaultdict(list)
    for entry in entries:
        for shard in _cut(entry, entry.data.detach().view(-1), 0):
            found[shard.key].append(shard)
        part = held.get(id(entry.data))
        if part is None:
            continue
        tensors = {f"optimizer.state.{name}.": part.state[name] for name in _MOMENTS if name in part.state}
        if part.main.dtype != entry.data.dtype:
            tensors[MAIN] = part.main
        for prefix, tensor in tensors.items():
            for shard in _cut(entry, tensor.detach().view(-1), part.start, sharded=part.sharded):
                key = f"{prefix}{shard.key}"
                found[key].append(replace(shard, key=key))
    return dict(found)


def model_shards(modules: Sequence[Any]) -> Shards:
    """Shards of the weights of model chunks alone by name. Their tensors are the weights."""
    found: Shards = defaultdict(list)
    for entry in _entries(modules):
        for shard in _cut(entry, entry.data.detach().view(-1), 0):
            found[shard.key].append(shard)
    return dict(found)


def whole_weights(modules: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors, on the CPU, of the weights of model chunks, as a checkpoint would hold them.

    Every rank iterates to the end and gets all of them, one after another: each part is broadcast by the rank that
    would write it.
    """
    mine = main_replicas(model_shards(modules))
    parts = [(key, shard) for key in sorted(mine) for shard in mine[key]]
    described = [(key, s.global_shape, s.global_offset, s.local_shape, s.dtype) for key, s in parts]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, described)
    device = next(modules[0].parameters()).device
    left = iter(parts)
    by_key = sorted(
        ((*one, rank) for rank, found in enumerate(everywhere) for one in found), key=lambda one: (one[0], one[-1])
    )
    for key, group in groupby(by_key, key=lambda one: one[0]):
        whole, filled = torch.empty(0), 0
        for _, size, corner, shape, dtype, rank in group:
            own = rank == dist.get_rank()
            part = next(left)[1].data.contiguous() if own else torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(part, src=rank)
            if not filled:
                whole = torch.empty(size, dtype=dtype)
            whole[tuple(slice(begin, begin + length) for begin, length in zip(corner, shape, strict=True))] = part
            filled += part.numel()
        if filled != whole.numel():
            raise RuntimeError(f"the parts of {key} on all ranks are not the whole")
        yield key, whole


def _entries(modules: Sequence[Any]) -> list[ShardedTensor | ShardedTensorFactory]:
    """The weights of model chunks as megatron-core shards them."""
    return [
        entry
        for module in modules
        for entry in nested_values(module.sharded_state_dict())
        # The rest are extra states of Transformer Engine's layers, which this model has none of.
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    ]


def rng_shards() -> Shards:
    """Copy of this rank's RNG state, uint8 [tensor, pipeline, data x context, bytes] each."""
    place = (
        (0, parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()),
        (1, parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_world_size()),
        (
            2,
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
            parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        ),
    )
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items():
        states[f"tracker.{name}"] = state
    return {
        f"rng.{name}": [ShardedTensor.from_rank_offsets(f"rng.{name}", state.clone()[None, None, None], *place)]
        for name, state in states.items()
    }


def set_rng_state(shards: Shards) -> None:
    """Restore the RNG state from `rng_shards`."""
    states = {key.removeprefix("rng."): shard.data[0, 0, 0] for key, (shard,) in shards.items()}
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {name.removeprefix("tracker."): s for name, s in states.items() if name.startswith("tracker.")}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracked)


def main_replicas(shards: Shards) -> Shards:
    """The shards that this rank writes; the same ones of other ranks are copies."""
    mine = {key: [s for s in found if is_main_replica(s.replica_id)] for key, found in shards.items()}
    return {key: found for key, found in mine.items() if found}


def optimizer_scalars(optimizer: MegatronOptimizer) -> dict[str, Any]:
    """State of the optimizer besides tensors: Adam's count of updates, and the fp16 loss scale with its trackers."""
    steps = {step for adam in _adams(optimizer) for step in _steps(adam)}
    if len(steps) > 1:
        raise RuntimeError(f"parameters with different counts of updates: {sorted(steps)}")
    result: dict[str, Any] = {"step": steps.pop() if steps else 0.0}
    for part in _parts(optimizer):
        scaler = getattr(part, "grad_scaler", None)
        if scaler is not None:
            state = scaler.state_dict()
            result["grad_scaler"] = {k: v.item() if torch.is_tensor(v) else v for k, v in state.items()}
    return result


def set_optimizer_scalars(optimizer: MegatronOptimizer, scalars: dict[str, Any]) -> None:
    """Restore what `optimizer_scalars` gave."""
    for inner in _adams(optimizer):
        for group in inner.param_groups:
            if _counts_in_groups(inner):
                group["step"] = int(scalars["step"])
                continue
            for parameter in group["params"]:
                inner.state[parameter]["step"] = _count(float(scalars["step"]), group, parameter)
    for part in _parts(optimizer):
        scaler = getattr(part, "grad_scaler", None)
        if scaler is not None and "grad_scaler" in scalars:
            stored = dict(scalars["grad_scaler"])
            scaler.load_state_dict({**stored, "scale": torch.full_like(scaler.scale, stored["scale"])})


def complete_state(optimizer: MegatronOptimizer) -> None:
    """Give Adam and Muon the state of step 0 where they have none: before the first update, which fp16 may have
    skipped."""
    for part in _parts(optimizer):
        if isinstance(part.optimizer, MuonAndAdam):
            part.optimizer.muon.complete_state()
    for inner in _adams(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state[parameter]
                if not _counts_in_groups(inner):
                    state.setdefault("step", _count(0.0, group, parameter))
                state.setdefault("exp_avg", torch.zeros_like(parameter))
                state.setdefault("exp_avg_sq", torch.zeros_like(parameter))


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """megatron-core's optimizers behind `optimizer`."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _adams(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The Adams behind `optimizer`."""
    inner = [part.optimizer for part in _parts(optimizer) if part.optimizer is not None]
    return [one.adam if isinstance(one, MuonAndAdam) else one for one in inner]


def _counts_in_groups(inner: torch.optim.Optimizer) -> bool:
    """True when this Adam keeps its count of updates per group (apex, Transformer Engine) and not per parameter."""
    return not isinstance(inner, torch.optim.Adam | torch.optim.AdamW)


def _count(step: float, group: dict[str, Any], parameter: Tensor) -> Tensor:
    """A parameter's count of updates as torch's Adam keeps it: on the device when it is fused."""
    return torch.tensor(step, device=parameter.device if group.get("fused") else "cpu")


def _steps(inner: torch.optim.Optimizer) -> set[float]:
    """Adam's counts of updates so far; none when this rank has no parameters."""
    if _counts_in_groups(inner):
        return {float(group.get("step", 0)) for group in inner.param_groups if group["params"]}
    return {float(inner.state[p]["step"]) for group in inner.param_groups for p in group["params"]}


@dataclass(frozen=True)
class _Part:
    """A parameter of the model and what this rank's optimizer updates of it: `main`, whose first element is number
    `start` of the flattened parameter. `sharded`: the data-parallel replicas hold the other elements."""

    model: Tensor
    main: Tensor
    start: int
    state: dict[str, Tensor]
    sharded: bool


def _held(optimizer: MegatronOptimizer) -> Iterator[_Part]:
    """Each parameter of which this rank updates some part."""
    for part in _parts(optimizer):
        inner = part.optimizer
        if inner is None:
            continue
        if isinstance(part, DistributedOptimizer):
            for model, (group, order) in part.model_param_group_index_map.items():
                main = inner.param_groups[group]["params"][order]
                buffer, dtype, bucket = part.model_param_gbuf_map[model]
                start = part.gbuf_ranges[buffer][dtype][bucket]["param_map"][model]["param"].start
                yield _Part(model, main, start, inner.state[main], sharded=True)
        elif isinstance(part, FP32Optimizer):
            for main in (p for group in inner.param_groups for p in group["params"]):
                yield _Part(main, main, 0, inner.state[main], sharded=False)
        else:
            for models, mains in (
                *zip(part.float16_groups, part.fp32_from_float16_groups, strict=True),
                *((group, group) for group in part.fp32_from_fp32_groups),
            ):
                for model, main in zip(models, mains, strict=True):
                    yield _Part(model, main, 0, inner.state[main], sharded=False)


def _cut(
    entry: ShardedTensor | ShardedTensorFactory, flat: Tensor, start: int, *, sharded: bool = False
) -> Iterator[ShardedTensor]:
    """`flat`, elements [start, start + len) of the flattened tensor of `entry`, as blocks of the whole tensor.

    `sharded`: no other data-parallel replica holds these elements, so this rank is the one to write them.
    """
    stop = start + flat.numel()
    for shard, offset in _places(entry):
        low, high = max(start, offset), min(stop, offset + math.prod(shard.local_shape))
        position = low - start
        for corner, sizes in rectangles(tuple(shard.local_shape), low - offset, high - offset) if low < high else ():
            count = math.prod(sizes)
            prepended = shard.prepend_axis_num
            shape = (1,) * prepended + sizes
            inside = (0,) * prepended + corner
            yield ShardedTensor(
                key=shard.key,
                data=flat[position : position + count].view(shape),
                dtype=flat.dtype,
                local_shape=shape,
                global_shape=shard.global_shape,
                global_offset=tuple(a + b for a, b in zip(shard.global_offset, inside, strict=True)),
                # Blocks of different sizes; torch checks that together they fill the tensor once.
                axis_fragmentations=None,
                replica_id=(*shard.replica_id[:-1], 0) if sharded else shard.replica_id,
                allow_shape_mismatch=shard.allow_shape_mismatch,
            )
            position += count


def _places(entry: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[ShardedTensor, int]]:
    """The shards that `entry` stands for, each with the place of its first element in the entry's flattened tensor.

    A factory (gate and up projection in one matrix) gets a tensor without memory, whose views show the places.
    """
    if isinstance(entry, ShardedTensor):
        yield entry, 0
        return
    blank = replace(entry, data=torch.empty_like(entry.data, device="meta"))
    for shard in nested_values(blank.build()):
        if not shard.data.is_contiguous():
            raise RuntimeError(f"{shard.key} is not a run of elements of its parameter")
        yield shard, shard.data.storage_offset()


def rectangles(shape: tuple[int, ...], low: int, high: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements [low, high) of a flattened tensor of `shape` as blocks (corner, sizes), in order."""
    if len(shape) <= 1:
        yield (low,), (high - low,)
        return
    row = math.prod(shape[1:])
    first, last = -(-low // row), high // row
    if first > last:
        for corner, sizes in rectangles(shape[1:], low - last * row, high - last * row):
            yield (last, *corner), (1, *sizes)
        return
    if low < first * row:
        for corner, sizes in rectangles(shape[1:], low - (first - 1) * row, row):
            yield (first - 1, *corner), (1, *sizes)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    if last * row < high:
        for corner, sizes in rectangles(shape[1:], 0, high - last * row):
            yield (last, *corner), (1, *sizes)

"""Loading a checkpoint, of any layout, without running anything that is in it.

Two things in a checkpoint are pickles: torch's `.metadata`, which `metadata` reads without making an object that it
names, and each tensor's record, which torch reads with weights_only=True. Nothing else is unpickled: objects beside
tensors, which torch would load without restriction, are refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.checkpointable import (
    CheckpointableShardedTensor,
    LocalShardsContainer,
)
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from sepllm_train.base.errors import UserError
from sepllm_train.config.compatibility import VOCABULARY
from sepllm_train.config.schema import Config
from sepllm_train.distributed.collectives import on_all_ranks
from sepllm_train.model.build import build_model
from sepllm_train.model.gpt import SepGPTModel
from sepllm_train.training.checkpoint.files import altered, find, read_state
from sepllm_train.training.checkpoint.metadata import read_metadata
from sepllm_train.training.checkpoint.shards import (
    Shards,
    complete_state,
    layout,
    model_shards,
    rng_shards,
    set_optimizer_scalars,
    set_rng_state,
    training_shards,
)
from sepllm_train.training.setup import Training, set_schedule
from sepllm_train.training.state import TrainState

# Counters that differ between equal runs: wall-clock.
NOT_COUNTED = ("seconds",)
# Beginnings of the names of what a checkpoint holds besides weights.
_NOT_WEIGHTS = ("optimizer.", "rng.")


def load(checkpoint: Path, training: Training) -> TrainState:
    """Load model, optimizer, RNG state and counters; the schedule follows from the step.

    Any layout can load any other's checkpoint, with the optimizer sharded or not; the RNG state is restored
    when the layout is the same. Raises UserError when the files cannot be read as what this run needs.
    """
    content = read_state(checkpoint)
    complete_state(training.optimizer)
    same_layout = content["layout"] == layout()
    rng = rng_shards() if same_layout else {}
    read_into(checkpoint, training_shards(training) | rng)
    set_optimizer_scalars(training.optimizer, content["optimizer"])
    if same_layout:
        set_rng_state(rng)
    state = TrainState.from_dict(content["state"])
    set_schedule(training, state.step)
    return state


def load_for_evaluation(checkpoint: Path, config: Config, vocabulary: int, device: torch.device) -> SepGPTModel:
    """The model of `config`, without pipeline stages, with the weights of a checkpoint of any layout, for evaluation.

    `vocabulary` counts entries before padding. Every rank calls it. Raises UserError when the files cannot be read as
    what the model needs: each of its parameters must be there, no others are drawn.
    """
    model = build_model(config, vocabulary, draw=False).to(device)
    load_weights(checkpoint, [model])
    return model.eval()


def load_weights(checkpoint: Path, modules: Sequence[Any]) -> None:
    """Fill the weights of model chunks, and nothing else, from a checkpoint of any layout. Every rank calls it.

    Raises UserError when the files cannot be read as what these chunks need.
    """
    read_into(checkpoint, model_shards(modules))


def read_into(checkpoint: Path, shards: Shards) -> None:
    """Fill the tensors of `shards` from a checkpoint. Every rank calls it.

    Raises UserError on every rank when a tensor is not there, has another shape, or its file cannot be read.
    """
    containers = {
        key: LocalShardsContainer([CheckpointableShardedTensor.from_sh_ten(shard) for shard in found])
        for key, found in shards.items()
    }
    # Vocabularies are padded to a multiple that depends on the layout: what the checkpoint lacks of them is 0.
    padded = {key: found[0] for key, found in shards.items() if found[0].allow_shape_mismatch}
    fixed = [found[0] for key, found in shards.items() if key not in padded]
    reader = SafeReader(checkpoint)
    on_all_ranks(lambda: _readable(reader, padded))
    try:
        with torch.no_grad():
            for key in padded:
                for shard in shards[key]:
                    shard.data.zero_()
            torch_checkpoint.load(
                containers,
                storage_reader=reader,
                planner=MCoreLoadPlanner(
                    shapes_validation_sharded_tensors=fixed, allow_shape_mismatch_sharded_tensors=padded
                ),
            )
    except (Exception, CheckpointException) as error:  # torch's is a BaseException
        raise _not_loaded(checkpoint, error) from error


class StoredTensors:
    """Tensors of a checkpoint of any layout, read one at a time, whole or a block, without a process group.

    `entries` has the shape and type of each by name. Raises UserError when the checkpoint cannot be read.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        with self._reading():
            self._metadata = read_metadata(checkpoint)
        self.entries = cast(dict[str, TensorStorageMetadata], dict(sorted(self._metadata.state_dict_metadata.items())))

    @property
    def weights(self) -> list[str]:
        """Names of the weights of the model."""
        return [name for name in self.entries if not name.startswith(_NOT_WEIGHTS)]

    def read(self, name: str, corner: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
        """Read a tensor, or its block of `shape` at `corner`, of which 0 is what lies beyond the tensor."""
        entry = self.entries[name]
        corner, shape = corner or (0,) * len(entry.size), entry.size if shape is None else shape
        tensor = torch.zeros(tuple(shape), dtype=entry.properties.dtype)
        with self._reading():
            for chunk in entry.chunks:
                low = [max(a, b) for a, b in zip(corner, chunk.offsets, strict=True)]
                ends = zip(corner, shape, chunk.offsets, chunk.sizes, strict=True)
                high = [min(a + s, b + t) for a, s, b, t in ends]
                if all(a < b for a, b in zip(low, high, strict=True)):
                    part = self._part(name, chunk)[_between(low, high, chunk.offsets)]
                    tensor[_between(low, high, corner)] = part
        return tensor

    def _part(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        """A part of a tensor as it lies in a file."""
        place = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        with open(self.checkpoint / place.relative_path, "rb") as file:
            file.seek(place.offset)
            record = io.BytesIO(file.read(place.length))
        part = torch.load(record, map_location="cpu", weights_only=True)
        if not isinstance(part, Tensor) or part.shape != chunk.sizes:
            raise pickle.UnpicklingError(f"{name} is not whole: the shape of a part is not that on record")
        return part

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            # torch goes on with advice for those who wrote the file.
            cause = _cause(error).split(". In PyTorch")[0]
            raise UserError(f"the checkpoint {self.checkpoint} cannot be read ({cause}): take another one.") from error


def _between(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    """The block from `low` to `high`, counted from `origin`."""
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


def whole_tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint by name, in the order of the names, one at a time and without a process group.

    Raises UserError when the checkpoint cannot be read.
    """
    stored = StoredTensors(checkpoint)
    for name in stored.entries:
        yield name, stored.read(name)


def altered_on_any_rank(checkpoint: Path) -> str | None:
    """Damage in the content of a checkpoint's files, or None. Every rank calls it and hashes a part of them."""
    try:
        found = altered(checkpoint, dist.get_rank(), dist.get_world_size())
    except UserError as error:
        found = str(error)
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, found)
    return next((reason for reason in reasons if reason is not None), None)


def digest(path: Path) -> str:
    """SHA-256 over the sorted names and contents of every tensor (model, optimizer, RNG state of all ranks), the
    optimizer's scalars and the counters of a checkpoint, or of the newest whole one of a run folder.

    Runs with the same digest are in bitwise the same state; layouts do not matter except for the RNG state. Wall-clock
    is left out. Raises UserError when there is no whole checkpoint or it cannot be read.
    """
    total = hashlib.sha256()
    for name, value in digests(path):
        total.update(f"{name} {value}\n".encode())
    return total.hexdigest()


def digests(path: Path) -> Iterator[tuple[str, str]]:
    """(name, SHA-256) of each tensor and counter that `digest` covers."""
    checkpoint = find(str(path))
    for name, tensor in whole_tensors(checkpoint):
        yield name, _of_tensor(tensor)
    content = read_state(checkpoint)
    for group in ("optimizer", "state"):
        for name, value in sorted(content[group].items()):
            if name not in NOT_COUNTED:
                encoded = json.dumps(value, sort_keys=True)
                yield f"{group}.{name}", hashlib.sha256(encoded.encode()).hexdigest()


def _of_tensor(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    result = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    result.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


class SafeReader(FileSystemReader):
    """torch's reader of checkpoint folders, with an unpickler that runs no code."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self.checkpoint = checkpoint
        self._metadata: Metadata | None = None

    def read_metadata(self, rank: int | None = None) -> Metadata:
        """Read names and places of the tensors, as `metadata.read_metadata`."""
        if self._metadata is None:
            self._metadata = read_metadata(self.checkpoint)
        return self._metadata


def _readable(reader: SafeReader, padded: dict[str, ShardedTensor]) -> None:
    """Read the description of a checkpoint. Raises UserError: torch would print a traceback first.

    padded: tensors whose first axis may have another length in the checkpoint, but not less than the vocabulary.
    """
    try:
        found = reader.read_metadata().state_dict_metadata
    except Exception as error:
        raise _not_loaded(reader.checkpoint, error) from None
    entries = read_state(reader.checkpoint)["identity"].get(VOCABULARY, 0)
    for name, wanted in padded.items():
        size = tuple(getattr(found.get(name), "size", wanted.global_shape))
        if size[1:] != tuple(wanted.global_shape[1:]) or size[0] < entries:
            raise _not_loaded(reader.checkpoint, ValueError(f"{name} has the shape {list(size)}"))


def _not_loaded(checkpoint: Path, error: BaseException) -> UserError:
    """Error for a checkpoint that could not be loaded."""
    return UserError(f"the checkpoint {checkpoint} cannot be loaded ({_cause(error)}): resume from another.")


def _cause(error: BaseException) -> str:
    """First line of the message of an error; torch wraps those of all ranks into one."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]

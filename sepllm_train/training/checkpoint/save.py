"""Saving while the run continues.

The tensors are copied to host memory, which is all that the steps wait for; a thread of each rank writes its copy,
hashes and syncs it. The thread of rank 0 completes the checkpoint when every rank has reported that its part is on the
disk. Reports go through torch.distributed's key-value store: no collective runs beside those of the steps, and a rank
whose disk is full can still report it.

A thread, not a process as in megatron-core's asynchronous saving: forking a process that runs gloo, CUDA and loader
threads copies locks that are never released, and a spawned one needs the tensors in shared memory, of which
containers have little. Copying, hashing, writing and syncing leave the interpreter to the steps.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pickle
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.strategies.checkpointable import (
    CheckpointableShardedTensor,
    LocalShardsContainer,
)
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan

from sepllm_train.base.errors import LostRank, UserError
from sepllm_train.base.files import PARTIAL
from sepllm_train.distributed.collectives import short
from sepllm_train.training.checkpoint import files
from sepllm_train.training.checkpoint.shards import (
    Shards,
    layout,
    main_replicas,
    optimizer_scalars,
    rng_shards,
    training_shards,
)
from sepllm_train.training.setup import Training
from sepllm_train.training.state import TrainState

# Seconds between the first looks at what other ranks have reported; the wait doubles up to the last.
_FIRST_POLL, _LAST_POLL = 0.02, 0.5
# Seconds that a run which ends in an error leaves a checkpoint in flight to be completed.
_GRACE = 30.0
# Saves of this process: the same number on every rank names the same save in the store.
_numbers = itertools.count()


@dataclass(frozen=True)
class Outcome:
    """A save that has ended: its step, seconds from start to end, those of them that the steps waited for, bytes of
    all ranks, and what went wrong, if so."""

    step: int
    checkpoint: Path
    seconds: float
    stall_seconds: float
    bytes: int
    error: str | None


class Saver:
    """Writes checkpoints of a run, one at a time. Every rank makes one and calls it at the same steps.

    keep: newest checkpoints that stay, besides those for whose step `kept` is true. With `background`, host memory for
    one more copy of this rank's tensors is taken now and kept.
    """

    def __init__(
        self,
        run_folder: Path,
        training: Training,
        identities: dict[str, Any],
        *,
        keep: int,
        kept: Callable[[int], bool],
        background: bool,
    ) -> None:
        self.folder = run_folder / files.FOLDER
        self.training = training
        self.identities = identities
        self.keep = keep
        self.kept = kept
        self.background = background
        token = [secrets.token_hex(4)]
        dist.broadcast_object_list(token, src=0)
        # A rank of a killed run that still writes does so into a folder of its own.
        self._token = token[0]
        self._plan, self._metadata = _agree_on_plan(_plan(self._mine())[0])
        self._buffers = [_buffer(tensor) for tensor in _plan(self._mine())[1]] if background else []
        self._job: _Job | None = None
        # The last save that has ended, and those that were not asked for yet.
        self._last: Outcome | None = None
        self._unread: list[Outcome] = []

    def save(self, state: TrainState, *, again: bool = False) -> None:
        """Start saving; an earlier save is waited for.

        Without `background` it returns when the checkpoint is there. A step that is saved or being saved is not saved
        again, unless `again`. Failures are reported by `poll` and `finish`.
        """
        begin = time.perf_counter()
        if self._job is not None and self._job.step == state.step and not again:
            return
        self._wait()
        if not again and self._last is not None and self._last.step == state.step and self._last.error is None:
            return
        plan, tensors = _plan(self._mine())
        if plan.items != self._plan.items:
            raise RuntimeError("the tensors of this run are not those it began with")
        content = {
            "state": state.to_dict(),
            "optimizer": optimizer_scalars(self.training.optimizer),
            "layout": layout(),
            **self.identities,
        }
        if self.background:
            for buffer, tensor in zip(self._buffers, tensors, strict=True):
                buffer.copy_(tensor, non_blocking=True)
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
            tensors = self._buffers
        self._job = _Job(self, state.step, tensors, content)
        if not self.background:
            self._job.thread.join()
        self._job.stall = time.perf_counter() - begin

    def poll(self) -> list[Outcome]:
        """The saves that have ended since the last call."""
        if self._job is not None and not self._job.thread.is_alive():
            self._wait()
        return self._take()

    def finish(self) -> list[Outcome]:
        """Wait for the save in flight; gives what `poll` would.

        Raises UserError on every rank when the last checkpoint could not be written.
        """
        self._wait()
        outcome = self._last
        if outcome is not None and outcome.error is not None:
            whole = files.newest(self.folder.parent)
            rest = f"the same command continues from {whole}" if whole else "there is no earlier one"
            raise UserError(
                f"the last checkpoint, {outcome.checkpoint}, could not be written ({outcome.error}): {rest}."
            )
        return self._take()

    def abandon(self) -> None:
        """Give a save in flight some time to be completed, for a run that ends in an error of its own."""
        if self._job is not None:
            self._job.thread.join(_GRACE)

    def _mine(self) -> Shards:
        """Shards that this rank writes."""
        return main_replicas(training_shards(self.training) | rng_shards())

    def _wait(self) -> None:
        """Wait for the save in flight. Raises LostRank when the ranks could not agree on how it went."""
        if self._job is not None:
            job, self._job = self._job, None
            job.thread.join()
            if job.outcome is None:
                raise LostRank(
                    f"the processes could not agree on checkpoint {job.target} ({job.failure}): the launcher, or the "
                    "process that holds torch.distributed's store, has ended. The same command continues from the "
                    "newest checkpoint."
                )
            self._last = replace(job.outcome, stall_seconds=job.stall)
            self._unread.append(self._last)

    def _take(self) -> list[Outcome]:
        """The outcomes that were not asked for yet."""
        outcomes, self._unread = self._unread, []
        return outcomes


def save_weights(run_folder: Path, model: Any, identities: dict[str, Any], state: dict[str, Any] | None) -> Path:
    """Write the weights of `model`, without an optimizer, as the checkpoint of a run; gives its path.

    state: counters as in state.json, None for those of step 0. In a process grid of one. Raises UserError when it
    cannot be written.
    """
    counters = TrainState() if state is None else TrainState.from_dict(state)
    # An optimizer of nothing: there is no state of one to write.
    training = Training([], [model], ChainedOptimizer([]), None, position=int)
    saver = Saver(run_folder, training, identities, keep=1, kept=lambda step: False, background=False)
    saver.save(counters)
    saver.finish()
    return files.step_folder(saver.folder, counters.step)


class _Job:
    """One save: the thread of this rank, and its outcome once that has ended."""

    def __init__(self, saver: Saver, step: int, tensors: list[Tensor], content: dict[str, Any]) -> None:
        self.step = step
        self.saver = saver
        self.tensors = tensors
        self.content = content
        self.target = files.step_folder(saver.folder, step)
        self.aside = self.target.with_name(f"{self.target.name}.{saver._token}{PARTIAL}")
        self.store = dist.PrefixStore(f"checkpoint/{next(_numbers)}", dist.distributed_c10d._get_default_store())
        self.begin = time.perf_counter()
        self.stall = 0.0
        # None also after the end, when the store could not be reached; `failure` is then the reason.
        self.outcome: Outcome | None = None
        self.failure = ""
        self.thread = threading.Thread(target=self._run, name=f"checkpoint-{step}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        """Body of the thread."""
        _yield_to_training()
        try:
            self.outcome = self._save()
        except Exception as error:
            self.failure = short(str(error)) or type(error).__name__

    def _save(self) -> Outcome:
        """Write this rank's part; rank 0 completes the checkpoint; all learn how it went.

        Raises torch.distributed's errors when the store is gone.
        """
        rank = dist.get_rank()
        self.store.set(str(rank), json.dumps(_attempt(self._write_part)))
        if rank == 0:
            reports = [json.loads(self._read(str(other))) for other in range(dist.get_world_size())]
            for other in range(dist.get_world_size()):
                self.store.delete_key(str(other))
            failures = [(other, report["error"]) for other, report in enumerate(reports) if report["error"]]
            if failures:
                error = f"{failures[0][1]}, on rank {failures[0][0]}" if len(reports) > 1 else failures[0][1]
                verdict = {"error": error, "result": None}
            else:
                verdict = _attempt(lambda: self._complete([report["result"] for report in reports]))
            if verdict["error"]:
                shutil.rmtree(self.aside, ignore_errors=True)
            self.store.set("verdict", json.dumps(verdict))
        verdict = json.loads(self._read("verdict"))
        seconds = time.perf_counter() - self.begin
        return Outcome(self.step, self.target, seconds, 0.0, verdict["result"] or 0, verdict["error"])

    def _read(self, key: str) -> bytes:
        """Value of `key` once it is there. Blocking reads would keep the store from the training thread."""
        wait = _FIRST_POLL
        while not self.store.check([key]):
            time.sleep(wait)
            wait = min(2 * wait, _LAST_POLL)
        return self.store.get(key)

    def _write_part(self) -> dict[str, Any]:
        """Put this rank's tensors on the disk; gives the file's manifest entry and the place of each tensor in it."""
        self.aside.mkdir(parents=True, exist_ok=True)
        name = f"__{dist.get_rank()}_0.distcp"
        places = []
        with _HashedFile(self.aside / name) as file:
            for tensor in self.tensors:
                start = file.size
                # A copy where the tensor is a view: torch would write all of the memory behind it.
                whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
                torch.save(tensor.cpu() if whole else tensor.to("cpu", copy=True), cast(IO[bytes], file))
                file.check()
                places.append([start, file.size - start])
        indices = [[item.index.fqn, list(item.index.offset or ())] for item in self.saver._plan.items]
        return {"name": name, "entry": file.entry(), "places": [[*a, *b] for a, b in zip(indices, places, strict=True)]}

    def _complete(self, parts: list[dict[str, Any]]) -> int:
        """Write what describes the parts of all ranks and publish the checkpoint; gives its bytes."""
        metadata = self.saver._metadata
        assert metadata is not None
        metadata.storage_data = {
            MetadataIndex(name, offset): _StorageInfo(part["name"], start, length)
            for part in parts
            for name, offset, start, length in part["places"]
        }
        written = {part["name"]: part["entry"] for part in parts}
        common = io.BytesIO()
        torch.save({}, common)
        for name, data in {
            ".metadata": _pickled(metadata),
            # What else megatron-core's own loader looks for.
            "metadata.json": json.dumps(CheckpointingConfig("torch_dist", 1).__dict__).encode(),
            "common.pt": common.getvalue(),
            files.STATE: json.dumps(self.content, indent=2).encode(),
        }.items():
            with _HashedFile(self.aside / name) as file:
                file.write(data)
            written[name] = file.entry()
        files.publish(self.aside, self.target, written)
        files.succeed(self.target, self.saver.keep, self.saver.kept)
        return sum(entry["bytes"] for entry in written.values())


class _HashedFile:
    """A new file, hashed as it is written and on the disk when its block is left. Raises OSError where that fails.

    `write` itself never raises: torch's archive writer does not survive an exception from below. `check` does.
    """

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "wb", buffering=1 << 20)  # noqa: SIM115  closed in __exit__
        self._hash = hashlib.sha256()
        self._error: OSError | None = None
        self.size = 0

    def write(self, data: Any) -> int:
        """Append `data` (bytes or a buffer of bytes); gives their number."""
        length = memoryview(data).nbytes
        if self._error is None:
            try:
                self._stream.write(data)
            except OSError as error:
                self._error = error
        self._hash.update(data)
        self.size += length
        return length

    def flush(self) -> None:
        """Nothing: the file is flushed as a whole."""

    def check(self) -> None:
        """Raise the OSError that a `write` met."""
        if self._error is not None:
            raise self._error

    def entry(self) -> dict[str, Any]:
        """Size and hash for the manifest."""
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._stream:
            if kind is None:
                self.check()
                self._stream.flush()
                os.fsync(self._stream.fileno())


def _plan(shards: Shards) -> tuple[SavePlan, list[Tensor]]:
    """Plan of the items that this rank writes, as torch's distributed checkpoint has it, and the tensor of each."""
    containers = {
        key: LocalShardsContainer([CheckpointableShardedTensor.from_sh_ten(shard) for shard in found])
        for key, found in shards.items()
    }
    planner = MCoreSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(containers)
    plan = planner.create_local_plan()
    return plan, [planner.resolve_data(item) for item in plan.items]


class _MetadataPickler(pickle.Pickler):
    """Writes metadata as all supported versions of torch read it.

    A tensor's properties have a sixth field in torch 2.15 (strides, of no use to a checkpoint); torch 2.13 refuses more
    than the first five, and newer versions read five.
    """

    def reducer_override(self, value: Any) -> Any:
        """The first five properties of a tensor; anything else as usual."""
        if not isinstance(value, TensorProperties):
            return NotImplemented
        make, arguments, properties, *_ = cast("tuple[Any, ...]", value.__reduce_ex__(pickle.DEFAULT_PROTOCOL))
        return make, arguments, properties[:5]


def _pickled(metadata: Metadata) -> bytes:
    buffer = io.BytesIO()
    _MetadataPickler(buffer).dump(metadata)
    return buffer.getvalue()


def _agree_on_plan(plan: SavePlan) -> tuple[SavePlan, Metadata | None]:
    """Check that the ranks' parts fill every tensor once; rank 0 gets the description of all of them.

    Raises ValueError on every rank where they do not.
    """
    plans: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(plans, plan)
    planner = MCoreSavePlanner(flatten_state_dict=False)
    planner.set_up_planner({}, is_coordinator=True)
    _, metadata = planner.create_global_plan(plans)
    return plan, metadata if dist.get_rank() == 0 else None


def _buffer(tensor: Tensor) -> Tensor:
    """Host memory for a copy of `tensor`, touched so that the first copy costs no more than the later ones."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).zero_()


def _attempt(action: Callable[[], Any]) -> dict[str, Any]:
    """{result, error} of `action`: errors in the thread are reported to all ranks, not lost with it."""
    try:
        return {"result": action(), "error": None}
    except OSError as error:
        return {"result": None, "error": error.strerror or str(error)}
    except UserError as error:
        return {"result": None, "error": str(error).rstrip(".")}
    except Exception as error:
        return {"result": None, "error": f"{type(error).__name__}: {error}"}


def _yield_to_training() -> None:
    """Let this thread have the processor when the steps do not need it."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
    except (AttributeError, OSError):
        return

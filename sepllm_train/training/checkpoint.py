"""Checkpoints of a run: megatron-core's sharded format for tensors, JSON for counters, whole or not there.

RUN/checkpoints/step_00000100/ holds the shards and `state.json`, which is written last.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from data_prep.files import sync_folder, write_whole
from sepllm_train.config.schema import Config
from sepllm_train.errors import UserError
from sepllm_train.training.setup import Training, set_schedule
from sepllm_train.training.state import TrainState

STATE = "state.json"


def identity(config: Config, vocabulary: int, data: dict[str, Any], tokenizer: str) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that continues from it, by configuration key."""
    return {
        **{f"model.{key}": value for key, value in asdict(config.model).items() if key not in ("name", "vocabulary")},
        "model.vocabulary": vocabulary,
        **{f"attention.{key}": value for key, value in asdict(config.attention).items() if key != "backend"},
        "data (hash of the tokens)": data,
        "data (hash of the tokenizer)": tokenizer,
        "data.sequence_length": config.data.sequence_length,
        "data.validation_fraction": config.data.validation_fraction,
        "seed": config.seed,
        "training.global_batch": config.training.global_batch,
        "training.precision": config.training.precision,
    }


def schedule_identity(config: Config) -> dict[str, Any]:
    """What a run that is continued in place must keep besides: length and optimizer settings."""
    optim = {f"optim.{key}": value for key, value in asdict(config.optim).items()}
    return {**optim, "training.steps": config.training.steps}


def check_identity(found: dict[str, Any], wanted: dict[str, Any], where: str, remedy: str) -> None:
    """Raise UserError naming the first key whose value in the checkpoint at `where` is not the wanted one."""
    for key, value in json.loads(json.dumps(wanted)).items():
        if found.get(key) != value:
            raise UserError(f"{where} was written with {key}={found.get(key)}, this run has {value}: {remedy}.")


def newest(run_folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    folder = run_folder / "checkpoints"
    whole = sorted(path for path in folder.glob("step_????????") if (path / STATE).is_file())
    return whole[-1] if whole else None


def find(path: str) -> Path:
    """The checkpoint that `resume=PATH` means: a checkpoint folder, or the newest of a run folder."""
    folder = Path(path).expanduser()
    found = folder if (folder / STATE).is_file() else newest(folder)
    if found is None:
        raise UserError(
            f"resume={path}: there is no checkpoint there; give a run folder or RUN/checkpoints/step_NNNNNNNN, "
            "or resume=auto or never."
        )
    return found


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Counters and identities of a checkpoint. Raises UserError when they cannot be read."""
    try:
        return json.loads((checkpoint / STATE).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / STATE} cannot be read ({error}): resume from another checkpoint.") from None


def save(run_folder: Path, training: Training, state: TrainState, identities: dict[str, Any], *, keep: int) -> Path:
    """Write a checkpoint aside and move it into place; then drop all but the newest `keep`."""
    target = run_folder / "checkpoints" / f"step_{state.step:08d}"
    aside = target.with_name(target.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    _complete_adam(training.optimizer)
    dist_checkpointing.save(_tensors(training, loading=False), str(aside))
    dist.barrier()
    if dist.get_rank() == 0:
        content = {"state": state.to_dict(), "layout": layout(), **identities}
        write_whole(aside / STATE, json.dumps(content, indent=2).encode())
        for file in aside.iterdir():
            _sync(file)
        sync_folder(aside)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
        sync_folder(target.parent)
        _drop_old(target.parent, keep)
    dist.barrier()
    return target


def load(checkpoint: Path, training: Training) -> TrainState:
    """Load model, optimizer, random number generators and counters; the schedule follows from the step.

    Any tensor- and pipeline-parallel layout can load any other's checkpoint; random number generators are restored
    when the layout is the same. Raises UserError when the shards are missing or damaged.
    """
    content = read_state(checkpoint)
    same_layout = content["layout"] == layout()
    try:
        tensors = dist_checkpointing.load(_tensors(training, loading=True, with_rng=same_layout), str(checkpoint))
    except (Exception, CheckpointException) as error:  # torch's is a BaseException
        raise UserError(
            f"the checkpoint {checkpoint} cannot be loaded ({_cause(error)}): resume from another."
        ) from error
    for number, module in enumerate(training.modules):
        module.load_state_dict(tensors[f"model{number}"])
    training.optimizer.load_state_dict(tensors["optimizer"])
    _complete_adam(training.optimizer)
    if same_layout:
        _set_rng(tensors["rng"])
    state = TrainState.from_dict(content["state"])
    set_schedule(training.scheduler, state.step)
    return state


def _cause(error: BaseException) -> str:
    """The first line of what went wrong; torch wraps the errors of all ranks into one."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _complete_adam(optimizer: MegatronOptimizer) -> None:
    """Give Adam the state of step 0 where it has none: before the first update, which fp16 may have skipped."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            state = inner.state[parameter]
            state.setdefault("step", torch.tensor(0.0))
            state.setdefault("exp_avg", torch.zeros_like(parameter))
            state.setdefault("exp_avg_sq", torch.zeros_like(parameter))


def layout() -> dict[str, int]:
    """Sizes of the process grid."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def _tensors(training: Training, *, loading: bool, with_rng: bool = True) -> dict[str, Any]:
    """The sharded state of this rank."""
    model = {f"model{number}": module.sharded_state_dict() for number, module in enumerate(training.modules)}
    flat = {key: value for chunk in model.values() for key, value in chunk.items()} if len(model) == 1 else model
    result: dict[str, Any] = {**model, "optimizer": training.optimizer.sharded_state_dict(flat, is_loading=loading)}
    if with_rng:
        result["rng"] = _sharded_rng()
    return result


def _sharded_rng() -> ShardedObject:
    """Random number generators of this rank, one shard per place in the grid."""
    shape = tuple(layout().values())
    place = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )
    states = {"cpu": torch.get_rng_state(), "tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject("rng", states, shape, place)


def _set_rng(states: dict[str, Any]) -> None:
    """Restore what `_sharded_rng` stored."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])


def _drop_old(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in sorted(folder.glob("step_????????"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _sync(file: Path) -> None:
    """Put a file's content on the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

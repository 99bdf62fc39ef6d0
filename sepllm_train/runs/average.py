"""The mean of the weights of several checkpoints of a run, as a run of its own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sepllm_train.base.console import say
from sepllm_train.base.files import whole_folder
from sepllm_train.config.present import AVERAGED
from sepllm_train.config.schema import require
from sepllm_train.distributed.launch import alone
from sepllm_train.model.build import build_model
from sepllm_train.runs.open import Checkpoint, find_checkpoint, in_one_process, read_config, refuse_not_finite
from sepllm_train.runs.vocabulary import find_tokenizer
from sepllm_train.runs.write import write_run
from sepllm_train.training.checkpoint.load import StoredTensors
from sepllm_train.training.checkpoint.shards import MAIN, Shards, model_shards


def average_checkpoints(run_folder: Path | str, steps: Sequence[int], output: Path | str) -> None:
    """Write the mean of the weights of the checkpoints of `steps` to the folder `output`, as a run of weights alone.

    The sum is in float64, over the optimizer's fp32 copy of each weight where the checkpoint has one (bf16 and fp16),
    and the mean is rounded to the run's precision at the end. Counters, `identity` and `schedule` are those of the
    last step; config.yaml is the run's with the new name, and run.json records the checkpoints with their hashes.

    Raises UserError for a checkpoint that is not there or damaged, weights that are not finite or not of the run's
    model, and when `output` cannot be written.
    """
    folder, output = Path(run_folder), Path(output)
    config = replace(read_config(folder), name=output.name, run_root=str(output.parent))
    found = [
        Checkpoint.read(find_checkpoint(folder, step))
        for step in tqdm(sorted(steps), desc="checking", unit="checkpoint", leave=False, disable=None)
    ]
    last = found[-1]
    source = {
        "status": AVERAGED,
        "averaged_from": {"run": str(folder.resolve()), "checkpoints": [checkpoint.record() for checkpoint in found]},
    }
    identities = {key: last.state[key] for key in ("identity", "schedule")}
    own = in_one_process(config)
    with whole_folder(output) as aside:
        with alone(own):
            model = build_model(own, last.vocabulary, draw=False)
            _fill_with_mean(model, last.vocabulary, [StoredTensors(checkpoint.path) for checkpoint in found])
            write_run(aside, config, model, source, identities, last.state["state"])
        tokenizer = find_tokenizer(folder)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, aside / tokenizer.name)
    listed = ", ".join(f"{checkpoint.step:,}" for checkpoint in found)
    say(
        f"{output}: mean of {len(found)} checkpoints of {folder} (steps {listed}) as step {last.step:,} in "
        f"{config.training.precision}"
    )


@torch.no_grad()
def _fill_with_mean(model: Any, vocabulary: int, checkpoints: Sequence[StoredTensors]) -> None:
    """Fill a model with the mean of its weights in `checkpoints`, a tensor of a layer at a time."""
    shards = model_shards([model])
    for stored in checkpoints:
        _check(stored, shards, vocabulary)
    blocks = [(name, block) for name, found in shards.items() for block in found]
    for name, block in tqdm(blocks, desc="averaging", unit="tensor", leave=False, disable=None):
        total = torch.zeros(block.local_shape, dtype=torch.float64)
        for stored in checkpoints:
            finest = _finest(stored, name)
            part = stored.read(finest, block.global_offset, block.local_shape)
            refuse_not_finite(stored.checkpoint, [(finest, part)])
            total += part
        block.data.copy_(total / len(checkpoints))
        require(
            bool(block.data.isfinite().all()),
            f"the mean of {name} is beyond {str(block.data.dtype).removeprefix('torch.')}: take other checkpoints.",
        )


def _finest(stored: StoredTensors, name: str) -> str:
    """Name under which a checkpoint has a weight in its highest precision."""
    return MAIN + name if MAIN + name in stored.entries else name


def _check(stored: StoredTensors, shards: Shards, vocabulary: int) -> None:
    """Raise UserError unless a checkpoint has the weights of the model, and no others."""
    differing = sorted(set(stored.weights) ^ shards.keys())
    place = f"the checkpoint {stored.checkpoint} is not of the model in config.yaml"
    require(not differing, f"{place}: only one of them has {differing[:1]}.")
    for name, (block, *_) in shards.items():
        entry = stored.entries[_finest(stored, name)]
        size, wanted = tuple(entry.size), tuple(block.global_shape)
        # Vocabularies are padded to a multiple that depends on the layout.
        free = 1 if block.allow_shape_mismatch and size[0] >= vocabulary else 0
        require(
            size[free:] == wanted[free:] and entry.properties.dtype.is_floating_point,
            f"{place}: {name} has the shape {list(size)} in {entry.properties.dtype} and should have {list(wanted)}.",
        )

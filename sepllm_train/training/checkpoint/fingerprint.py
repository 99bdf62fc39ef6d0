"""One number for all that a checkpoint holds of the state of training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sepllm_train.training.checkpoint.files import find, read_state
from sepllm_train.training.checkpoint.load import whole_tensors

# Counters that differ between equal runs: wall-clock.
NOT_COUNTED = ("seconds",)


def digest(path: Path) -> str:
    """SHA-256 over the sorted names and contents of every tensor (model, optimizer, random number generators of all
    ranks), the optimizer's scalars and the counters of a checkpoint, or of the newest whole one of a run folder.

    Runs with the same digest are in bitwise the same state; layouts do not matter except for the generators. Wall-clock
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

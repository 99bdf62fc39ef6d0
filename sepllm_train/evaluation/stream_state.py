"""A stream on the disk: how far it is, and its cache, so that the same command continues it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sepllm_train.base.errors import UserError, first_line
from sepllm_train.base.files import sync_folder, write_whole

FOLDER = "state"
_SLOTS = ("length", "limit", "seen", "position", "reach")


def save_state(folder: Path, cache: Any, progress: dict[str, Any]) -> None:
    """Write cache and progress to `folder`/state, whole or not at all."""
    from safetensors.torch import save_file

    aside, place, old = (folder / f"{FOLDER}{suffix}" for suffix in (".new", "", ".old"))
    if old.exists() and not place.exists():
        # A stop between the two renames below: this is the only copy.
        old.rename(place)
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors, numbers = cache_tensors(cache)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside / "cache.safetensors")
    with open(aside / "cache.safetensors", "rb") as file:
        os.fsync(file.fileno())
    write_whole(aside / "progress.json", json.dumps({**progress, "cache": numbers}).encode())
    if place.exists():
        place.rename(old)
    aside.rename(place)
    sync_folder(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path, cache: Any) -> dict[str, Any] | None:
    """Fill `cache` from what `save_state` wrote, and give the progress; None when there is nothing.

    Raises UserError when it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    # A stop between the two renames leaves the older one beside.
    place = next((folder / name for name in (FOLDER, f"{FOLDER}.old") if (folder / name).is_dir()), None)
    if place is None:
        return None
    try:
        progress: dict[str, Any] = json.loads((place / "progress.json").read_text())
        tensors = load_file(place / "cache.safetensors", device=str(cache.pattern.tier_of_token.device))
        fill_cache(cache, tensors, progress["cache"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        raise UserError(f"{place} cannot be read ({first_line(error)}): remove it to begin again.") from None
    return progress


def cache_tensors(cache: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and numbers of which `fill_cache` makes the same cache again."""
    tensors = {"offset": cache.offset, "tokens": cache.tokens, "ended": cache.ended}
    for group, held in enumerate(cache.held):
        tensors |= {f"group{group}.{name}": getattr(held.slots, name) for name in _SLOTS}
        tensors[f"group{group}.length_sum"] = held.length_sum
    for number, layer in enumerate(cache.layers):
        tensors |= {f"layer{number}.{name}": tensor for name, tensor in layer.tensors().items()}
    return tensors, {
        "columns_seen": cache.columns_seen,
        "dropped_at": [held.dropped_at for held in cache.held],
    }


def fill_cache(cache: Any, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Make an empty cache what `cache_tensors` was called on."""
    rows, device = len(tensors["offset"]), tensors["offset"].device
    cache.begin(rows, device)
    cache.offset, cache.tokens, cache.ended = (tensors[name] for name in ("offset", "tokens", "ended"))
    cache.columns_seen = numbers["columns_seen"]
    for group, held in enumerate(cache.held):
        slots = replace(held.slots, **{name: tensors[f"group{group}.{name}"] for name in _SLOTS})
        length_sum = tensors[f"group{group}.length_sum"]
        cache.held[group] = replace(held, slots=slots, length_sum=length_sum, dropped_at=numbers["dropped_at"][group])
    for number, layer in enumerate(cache.layers):
        begin = f"layer{number}."
        layer.fill({name.removeprefix(begin): tensor for name, tensor in tensors.items() if name.startswith(begin)})

"""A stream on the disk: how far it is, and its cache, so that the same command continues it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sepllm_train.base.errors import UserError, first_line
from sepllm_train.base.files import restore_folder, whole_folder, write_json
from sepllm_train.base.parsing import read_json

FOLDER = "state"
_SLOTS = ("length", "limit", "seen", "position", "reach")


def save_state(folder: Path, cache: Any, progress: dict[str, Any]) -> None:
    """Write cache and progress to `folder`/state, whole or not at all."""
    from safetensors.torch import save_file

    from sepllm_train.hf.weights import writing_safetensors

    place = folder / FOLDER
    restore_folder(place)
    with whole_folder(place) as aside:
        tensors, numbers = cache_tensors(cache)
        with writing_safetensors():
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside / "cache.safetensors")
        write_json(aside / "progress.json", {**progress, "cache": numbers})


def load_state(folder: Path, cache: Any) -> dict[str, Any] | None:
    """Fill `cache` from what `save_state` wrote, and give the progress; None when there is nothing.

    Raises UserError when it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    place = folder / FOLDER
    restore_folder(place)
    if not place.is_dir():
        return None
    try:
        progress = read_json(place / "progress.json", "it is damaged", nan=True)
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

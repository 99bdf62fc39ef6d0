"""Whether runs may be compared, and what a reader must know when they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_prep.errors import UserError
from sepllm_train.compare.records import Run

# What run.json must tell for a loss to mean the same in two runs, and how to call it.
REQUIRED = {
    "data": "data",
    "tokenizer": "tokenizers",
    "vocabulary": "vocabularies",
    "sequence_length": "sequence lengths",
}
# Noise between runs, not another task: told as a caveat.
ALLOWED = "seed_of_data_order"


def check_comparable(runs: Sequence[Run]) -> None:
    """Raise UserError naming the first difference in data, tokenizer, vocabulary, sequence length or the like.

    Whatever run.json holds under `comparable` must agree, the seed of the data's order aside.
    """
    for run in runs:
        for key in REQUIRED:
            if key not in run.info["comparable"]:
                raise UserError(f"{run.folder / 'run.json'} has no comparable.{key}, so the run cannot be compared.")
    first, told = runs[0].info["comparable"], flatten(runs[0].info["comparable"])
    for run in runs[1:]:
        other = flatten(run.info["comparable"])
        for key in [*REQUIRED, *sorted((first.keys() | run.info["comparable"].keys()) - REQUIRED.keys() - {ALLOWED})]:
            for name in sorted(n for n in told.keys() | other.keys() if n == key or n.startswith(f"{key}.")):
                if told.get(name) != other.get(name):
                    raise UserError(
                        f"The runs cannot be compared, they used different {REQUIRED.get(key, key)}: {name} is "
                        f"{told.get(name, 'absent')!r} in {runs[0].folder} and {other.get(name, 'absent')!r} in "
                        f"{run.folder}."
                    )


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings of run.json that differ between the runs: dotted name to the value in each run."""
    groups = ("parameters", "attention", "world_size", "devices", "status", "steps")
    told = [flatten({key: run.info[key] for key in groups if key in run.info}) for run in runs]
    names = list(dict.fromkeys(name for settings in told for name in settings))
    values = {name: [settings.get(name) for settings in told] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def caveats(runs: Sequence[Run]) -> list[str]:
    """Sentences on what weakens this comparison, for the console and the page."""
    told = []
    for run in runs:
        if run.info.get("status") != "finished":
            told.append(f"{run.label} is not finished: its curve may still go on.")
    hardware = [(run.info.get("devices"), run.info.get("world_size")) for run in runs]
    if any(h != hardware[0] for h in hardware):
        told.append("The runs used different devices or numbers of processes: their seconds do not compare.")
    orders = [run.info["comparable"].get(ALLOWED) for run in runs]
    if any(order != orders[0] for order in orders):
        told.append("The runs read the data in different orders: part of a difference in loss is that.")
    sizes = [run.info.get("parameters") for run in runs]
    if any(size != sizes[0] for size in sizes):
        told.append("The runs trained models of different sizes.")
    return told


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by dotted name; a list is a leaf."""
    if not isinstance(value, dict):
        return {prefix: value}
    names = {key: f"{prefix}.{key}" if prefix else str(key) for key in value}
    return {name: leaf for key, child in value.items() for name, leaf in flatten(child, names[key]).items()}

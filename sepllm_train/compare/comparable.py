"""Whether runs may be compared, and what a reader must know when they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_prep.errors import UserError
from sepllm_train.compare.records import Run

# A loss means the same in two runs only if all of these are equal.
REQUIRED = {
    "data": "data",
    "tokenizer": "tokenizers",
    "vocabulary": "vocabularies",
    "sequence_length": "sequence lengths",
}


def check_comparable(runs: Sequence[Run]) -> None:
    """Raise UserError naming the first difference in data, tokenizer, vocabulary or sequence length."""
    first = flatten(runs[0].info["comparable"])
    for key, words in REQUIRED.items():
        for run in runs:
            if key not in run.info["comparable"]:
                raise UserError(f"{run.folder / 'run.json'} does not say comparable.{key}: the run is not comparable.")
        for run in runs[1:]:
            other = flatten(run.info["comparable"])
            for name in sorted(n for n in first.keys() | other.keys() if n == key or n.startswith(f"{key}.")):
                if first.get(name) != other.get(name):
                    raise UserError(
                        f"The runs cannot be compared, they used different {words}: {name} is {first.get(name)!r} in "
                        f"{runs[0].folder} and {other.get(name)!r} in {run.folder}."
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
    orders = [run.info["comparable"].get("seed_of_data_order") for run in runs]
    if any(order != orders[0] for order in orders):
        told.append("The runs read the data in different orders: part of a difference in loss is that.")
    sizes = [run.info.get("parameters") for run in runs]
    if any(size != sizes[0] for size in sizes):
        told.append("The runs trained models of different sizes.")
    return told


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts and lists by dotted name."""
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)  # type: ignore[assignment]
    else:
        return {prefix: value}
    return {
        name: leaf
        for key, child in children
        for name, leaf in flatten(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }

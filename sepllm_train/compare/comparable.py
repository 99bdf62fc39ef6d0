"""Whether runs may be compared, and what a reader must know when they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from sepllm_train.base.errors import UserError
from sepllm_train.compare.curves import points
from sepllm_train.runs.records import CUMULATIVE, Record, Run

# What run.json must tell for a loss to mean the same in two runs, and how to call it.
REQUIRED = {
    "data": "data",
    "tokenizer": "tokenizers",
    "vocabulary": "vocabularies",
    "sequence_length": "sequence lengths",
}
# Noise between runs, not another task: told as a caveat.
ALLOWED = "seed_of_data_order"
# Another padding of the vocabulary, of a run resumed on more processes, moves FLOPs by less than this; another way to
# count them by more.
SAME_COUNT = 0.02


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
    groups = ("parameters", "attention", "world_size", "devices", "status", "steps", "curriculum")
    told = [flatten({key: run.info[key] for key in groups if key in run.info}) for run in runs]
    names = list(dict.fromkeys(name for settings in told for name in settings))
    values = {name: [settings.get(name) for settings in told] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def check_counts(run: Run) -> None:
    """Raise UserError unless the counters of a run grow from step to step, and count tokens in one way throughout.

    A run that was resumed by another version of the trainer may have counted in another way from there on. The tokens
    of a curriculum cost more from phase to phase by themselves.
    """
    records = sorted(run.training + run.validation, key=lambda record: record["step"])
    for before, after in pairwise(records):
        for key in CUMULATIVE:
            if after[key] < before[key]:
                raise UserError(
                    f"{run.metrics_file} has {key} fall from {before[key]:,} at step {before['step']} to "
                    f"{after[key]:,} at step {after['step']}: it holds records of different runs or conventions."
                )
    if _curriculum(run):
        return
    told = [record for record in records if record["tokens"] > 0]
    for record in told[1:]:
        if not math.isclose(dense_flops(record), dense_flops(told[0]), rel_tol=SAME_COUNT):
            raise UserError(
                f"{run.metrics_file} counts {dense_flops(told[0]):,.0f} flops/dense per token up to step "
                f"{told[0]['step']} and {dense_flops(record):,.0f} up to step {record['step']}: its conventions "
                "are mixed."
            )


def check_conventions(run: Run, first: Run) -> None:
    """Raise UserError when models of one shape have different FLOPs per token if dense: then the counting differs.

    Without layers in run.json's `identity`, an equal number of parameters stands for an equal shape.
    """
    if _shape(run) != _shape(first):
        return
    counts = [dense_flops(points(r)[-1]) for r in (run, first) if points(r)[-1]["tokens"] > 0]
    if len(counts) == 2 and not math.isclose(*counts, rel_tol=SAME_COUNT):
        raise UserError(
            f"{run.metrics_file} counts {counts[0]:,.0f} flops/dense per token and {first.metrics_file} "
            f"{counts[1]:,.0f} for a model of the same shape: their FLOPs are counted by different conventions."
        )


def dense_flops(record: Record) -> float:
    """FLOPs per token of a record as if the model were dense, which no pattern changes."""
    return float(record["flops/dense"] / record["tokens"])


def _shape(run: Run) -> Any:
    """What flops/dense per token depends on."""
    identity = run.info.get("identity")
    settings = identity if isinstance(identity, dict) else {}
    model = {key: value for key, value in settings.items() if key.startswith("model.")}
    return run.info.get("parameters"), run.info["comparable"].get("sequence_length"), model, _curriculum(run)


def _curriculum(run: Run) -> Any:
    """The shorter sequences that a run began with, None without any."""
    return run.info.get("curriculum")


def caveats(runs: Sequence[Run], paired: bool = False, timed: bool = False) -> list[str]:
    """Sentences on what weakens this comparison, for the console and the page.

    `paired`: only runs of one order of the data are set against each other; `timed`: the seconds are not the runs'.
    """
    told = []
    for run in runs:
        if run.info.get("status") != "finished":
            told.append(f"{run.label} is not finished: its curve may still go on.")
        if run.info["comparable"].get("earlier_data"):
            told.append(f"{run.label} went on with other data: its earlier losses are of the data before.")
    hardware = [(run.info.get("devices"), run.info.get("world_size")) for run in runs]
    if not timed and any(h != hardware[0] for h in hardware):
        told.append("The runs used different devices or numbers of processes: their seconds do not compare.")
    orders = [run.info["comparable"].get(ALLOWED) for run in runs]
    if not paired and any(order != orders[0] for order in orders):
        told.append(
            "The runs read the data in different orders, and may be validated on different sequences of the held-out "
            "documents: part of a difference in loss is that."
        )
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

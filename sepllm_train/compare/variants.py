"""Variants of a comparison, each the runs that differ in nothing but their seed; and what makes runs comparable."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from sepllm_train.base.errors import UserError
from sepllm_train.base.parsing import read_yaml
from sepllm_train.compare.timing import VariantTiming
from sepllm_train.runs.records import (
    CUMULATIVE,
    LOSS,
    SCORE,
    Record,
    Run,
    read_run,
    refuse_twins,
    same_data,
    tell_apart,
)

# What may differ between the seeds of a variant.
FREE_KEYS = ("seed", "name", "run_root", "resume", "evaluation")
# What a sweep of the learning rate changes.
RATE_KEYS = ("lr", "min_lr")
SEED_SUFFIX = re.compile(r"(?:[-_.]?seed|[-_.]s)[-_]?(\d+)$")

# What run.json must tell for a loss to mean the same in two runs, and how to call it.
REQUIRED = {
    "data": "data",
    "tokenizer": "tokenizers",
    "vocabulary": "vocabularies",
    "sequence_length": "sequence lengths",
}
# Noise between runs, not another task: reported as a caveat.
ALLOWED = "seed_of_data_order"
# Another padding of the vocabulary, of a run resumed on more processes, moves FLOPs by less than this; another way to
# count them by more.
SAME_COUNT = 0.02


@dataclass
class Variant:
    """Runs of one configuration, one per seed; `timing` is set when seconds are those of a timing benchmark."""

    label: str
    runs: list[Run]
    timing: VariantTiming | None = None

    @property
    def seeds(self) -> int:
        """Number of runs."""
        return len(self.runs)


def _warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr)


def read_variants(
    folders: Sequence[Path],
    *,
    groups: bool = True,
    strict: bool = False,
    warn: Callable[[str], None] = _warn,
) -> list[Variant]:
    """Read run folders as variants, in the order in which they are given; the first variant is the reference.

    Runs whose config.yaml differs in FREE_KEYS alone form one variant, unless `groups` is false; a run without a
    readable config.yaml is a variant of its own, and so is one that repeats the seed of another. A run that cannot be
    compared (nothing logged, fewer than two validation points, broken records, mixed conventions) is left out, and
    `warn` gets a sentence that names it; another names a run that resumes from one whose records are missing. Raises
    UserError for a run that would be left out when `strict`, when the reference has no run left or no two variants are
    left; and always for a folder that is not there or given twice, and for runs of different data, tokenizers or the
    like, or without tokens in common.
    """
    if len(folders) < 2:
        raise UserError("A comparison needs at least two run folders, and one was given.")
    refuse_twins(folders)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give the folder of a run, such as runs/NAME.")
    runs, left_out = _usable(folders, strict)
    settings = [settings_of(folder) if groups else None for folder in folders]
    keys = [str(folder) if own is None else own[0] for folder, own in zip(folders, settings, strict=True)]
    reasons = f": {' '.join(left_out)}" if left_out else "."
    if runs and not any(folder in runs for folder, key in zip(folders, keys, strict=True) if key == keys[0]):
        raise UserError(f"{folders[0]} is the reference, which cannot be left out{reasons}")
    tell_apart(list(runs.values()))
    gathered = _gather(folders, keys, runs)
    if len(gathered) < 2:
        raise UserError(_too_few(gathered, len(folders), left_out, reasons))
    check_comparable(list(runs.values()))
    check_curves(list(runs.values()))
    variants = [Variant(label, variant) for label, variant in zip(_labels(gathered, groups), gathered, strict=True)]
    for sentence in left_out:
        warn(f"Left out: {sentence}")
    for run in runs.values():
        if run.gap:
            warn(f"{run.label}: {run.gap}.")
    return variants


def runs_of(variants: Sequence[Variant]) -> list[Run]:
    """The runs of all variants."""
    return [run for variant in variants for run in variant.runs]


def pairs(variant: Variant, reference: Variant) -> list[tuple[Run, Run]]:
    """(run, run of the reference with the same seed), for each seed that both variants have.

    Two variants of a single run each are paired whatever their seeds are. The same seed gives the same order of the
    data and the same held-out sequences, so what these add to a loss is no part of the difference of a pair.
    """
    if variant.seeds == reference.seeds == 1:
        return [(variant.runs[0], reference.runs[0])]
    partners = {run.seed: run for run in reference.runs}
    return [(run, partners[run.seed]) for run in variant.runs if run.seed in partners]


def pairing_notes(variants: Sequence[Variant]) -> list[str]:
    """Sentences on runs that have no partner in the first variant."""
    notes = []
    for variant in variants[1:]:
        paired = pairs(variant, variants[0])
        ours, theirs = {run.seed for run, _ in paired}, {run.seed for _, run in paired}
        for one, other, seeds in ((variant, variants[0], ours), (variants[0], variant, theirs)):
            alone = [str(run.seed) for run in one.runs if run.seed not in seeds]
            if alone:
                words = ("Seeds", "have", "them") if len(alone) > 1 else ("Seed", "has", "it")
                notes.append(
                    f"{words[0]} {', '.join(alone)} of {one.label} {words[1]} no partner in {other.label}: ratios and "
                    f"differences between the two leave {words[2]} out."
                )
    return notes


def _usable(folders: Sequence[Path], strict: bool) -> tuple[dict[Path, Run], list[str]]:
    """Runs by folder, and sentences on those that cannot be compared; `strict` raises the first of these."""
    runs: dict[Path, Run] = {}
    left_out = []
    for folder in folders:
        try:
            run = read_run(folder)
            check_length(run)
            check_counts(run)
            check_conventions(run, next(iter(runs.values()), run))
        except UserError as error:
            if strict:
                raise
            left_out.append(str(error))
        else:
            runs[folder] = run
    return runs, left_out


def settings_of(folder: Path, *, without_rate: bool = False) -> tuple[str, float] | None:
    """Return a run's configuration apart from FREE_KEYS as text to compare, and its learning rate (nan without one).

    `without_rate` takes the learning rate out of the text. None where no configuration can be read.
    """
    try:
        config = read_yaml(folder / "config.yaml", "")
        if "seed" not in config:
            return None
        kept = {key: value for key, value in config.items() if key not in FREE_KEYS}
        rate = math.nan
        if isinstance(optim := kept.get("optim"), dict):
            rate = float(optim.get("lr", math.nan))
            dropped = RATE_KEYS if without_rate else ()
            kept["optim"] = {key: value for key, value in optim.items() if key not in dropped}
            if optim.get("optimizer") == "adam":
                # A run that is older than the key has Adam.
                del kept["optim"]["optimizer"]
        return yaml.safe_dump(_without_empty(kept), sort_keys=True), rate
    except (ValueError, TypeError):
        return None


def _without_empty(value: Any) -> Any:
    """A value without what is empty in it: a run that is older than a key is as one that leaves it empty."""
    if not isinstance(value, dict):
        return value
    kept = {key: _without_empty(entry) for key, entry in value.items()}
    return {
        key: entry for key, entry in kept.items() if entry is not None and entry is not False and entry not in ([], {})
    }


def _gather(folders: Sequence[Path], keys: Sequence[str], runs: dict[Path, Run]) -> list[list[Run]]:
    """Runs of equal keys together, in the order of the folders; a second run of a seed begins another variant."""
    gathered: dict[tuple[str, int], list[Run]] = {}
    for folder, key in zip(folders, keys, strict=True):
        # A run left out keeps the place of its variant.
        gathered.setdefault((key, 0), [])
        if (run := runs.get(folder)) is not None:
            number = 0
            while any(run.seed == other.seed for other in gathered.get((key, number), [])):
                number += 1
            gathered.setdefault((key, number), []).append(run)
    return [variant for variant in gathered.values() if variant]


def _labels(gathered: Sequence[list[Run]], groups: bool) -> list[str]:
    """Names of variants: that of their runs without the seed where it is unique, else the first run's."""
    stems = [_stem(variant) if groups else variant[0].label for variant in gathered]
    return [
        stem if stems.count(stem) == 1 and stem else variant[0].label
        for stem, variant in zip(stems, gathered, strict=True)
    ]


def _stem(variant: Sequence[Run]) -> str:
    """Common part of the names of a variant's runs without the seed; the first name if there is none."""
    found = [SEED_SUFFIX.search(run.label) for run in variant]
    stems = {run.label[: match.start()] if match else run.label for run, match in zip(variant, found, strict=True)}
    # A single run may well be called sep_s64 for another reason than its seed.
    alone = len(variant) == 1 and found[0] is not None and found[0][1] != str(variant[0].seed)
    return variant[0].label if len(stems) > 1 or alone else stems.pop()


def _too_few(gathered: Sequence[list[Run]], given: int, left_out: Sequence[str], reasons: str) -> str:
    """Sentence that there are not two variants."""
    if not gathered:
        return f"None of the {given} runs can be compared{reasons}"
    if not left_out:
        return (
            f"The {given} runs differ only in their seed, so they form one variant: add runs of another configuration, "
            "or compare them one by one with --no-groups."
        )
    return f"Only {gathered[0][0].label} is left to compare of {given} runs{reasons}"


def points(run: Run, metric: str = LOSS) -> list[Record]:
    """Records of validations, or of evaluations, at which `metric` is a finite number, in the order of steps."""
    records = run.evaluation if metric.startswith(SCORE) else run.validation
    return [record for record in records if math.isfinite(record.get(metric, math.nan))]


def check_length(run: Run) -> None:
    """Raise UserError unless a run has two validation points."""
    found = len(points(run))
    if found < 2:
        raise UserError(
            f"{run.metrics_file} has {found} validation point{'' if found == 1 else 's'} with a finite val/loss "
            f"and a curve needs two: {run.gap or 'train longer or lower training.validation_interval'}."
        )


def check_curves(runs: Sequence[Run]) -> None:
    """Raise UserError unless every run has two validation points, and all share a range of tokens."""
    for run in runs:
        check_length(run)
    late = max(runs, key=lambda run: points(run)[0]["tokens"])
    short = min(runs, key=lambda run: points(run)[-1]["tokens"])
    if points(late)[0]["tokens"] > points(short)[-1]["tokens"]:
        raise UserError(
            f"The runs have no tokens in common: {short.folder} was last validated at {points(short)[-1]['tokens']:,} "
            f"tokens and {late.folder} first at {points(late)[0]['tokens']:,}."
        )


def check_comparable(runs: Sequence[Run]) -> None:
    """Raise UserError naming the first difference in data, tokenizer, vocabulary, sequence length or the like.

    Whatever run.json holds under `comparable` must agree, the seed of the data's order aside.
    """
    for run in runs:
        for key in REQUIRED:
            if key not in run.info["comparable"]:
                raise UserError(f"{run.folder / 'run.json'} has no comparable.{key}, so the run cannot be compared.")
    first = runs[0].info["comparable"]
    for run in runs[1:]:
        other = run.info["comparable"]
        for key in [*REQUIRED, *sorted((first.keys() | other.keys()) - REQUIRED.keys() - {ALLOWED})]:
            if same_data(first.get(key), other.get(key)):
                continue
            ours, theirs = (flatten({key: settings.get(key)}) for settings in (first, other))
            # What only one of them has on record, last.
            for name in sorted(ours.keys() | theirs.keys(), key=lambda n: (n not in ours or n not in theirs, n)):
                if ours.get(name) != theirs.get(name):
                    raise UserError(
                        f"The runs cannot be compared, they used different {REQUIRED.get(key, key)}: {name} is "
                        f"{_shown(ours.get(name))} in {runs[0].folder} and {_shown(theirs.get(name))} in {run.folder}."
                    )


def _shown(value: Any) -> str:
    """A setting in a sentence, of which there may be a whole file in a damaged run.json."""
    text = "'absent'" if value is None else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings of run.json that differ between the runs: dotted name to the value in each run."""
    groups = ("parameters", "attention", "world_size", "devices", "status", "steps", "curriculum", "batch_schedule")
    found = [flatten({key: run.info[key] for key in groups if key in run.info}) for run in runs]
    names = list(dict.fromkeys(name for settings in found for name in settings))
    values = {name: [settings.get(name) for settings in found] for name in names}
    return {name: variant for name, variant in values.items() if any(value != variant[0] for value in variant)}


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
    counted = [record for record in records if record["tokens"] > 0]
    for record in counted[1:]:
        if not math.isclose(dense_flops(record), dense_flops(counted[0]), rel_tol=SAME_COUNT):
            raise UserError(
                f"{run.metrics_file} counts {dense_flops(counted[0]):,.0f} flops/dense per token up to step "
                f"{counted[0]['step']} and {dense_flops(record):,.0f} up to step {record['step']}: its conventions "
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
    """Everything that flops/dense per token depends on."""
    identity = run.info.get("identity")
    settings = identity if isinstance(identity, dict) else {}
    model = {key: value for key, value in settings.items() if key.startswith("model.")}
    # Short sequences have another share of the tokens where the batches of their steps are other ones.
    phases = (_curriculum(run), run.info.get("batch_schedule")) if _curriculum(run) else None
    return run.info.get("parameters"), run.info["comparable"].get("sequence_length"), model, phases


def _curriculum(run: Run) -> Any:
    """The shorter sequences that a run began with, None without any."""
    return run.info.get("curriculum")


def caveats(runs: Sequence[Run], paired: bool = False, timed: bool = False) -> list[str]:
    """Sentences on what weakens this comparison, for the console and the page.

    `paired`: only runs of one order of the data are set against each other; `timed`: the seconds are not the runs'.
    """
    sentences = []
    for run in runs:
        if run.info.get("status") != "finished":
            sentences.append(f"{run.label} is not finished: its curve may still go on.")
        if run.info["comparable"].get("earlier_data"):
            sentences.append(f"{run.label} went on with other data: its earlier losses are of the data before.")
    hardware = [(run.info.get("devices"), run.info.get("world_size")) for run in runs]
    if not timed and any(h != hardware[0] for h in hardware):
        sentences.append("The runs used different devices or numbers of processes: their seconds do not compare.")
    orders = [run.info["comparable"].get(ALLOWED) for run in runs]
    if not paired and any(order != orders[0] for order in orders):
        sentences.append(
            "The runs read the data in different orders, and may be validated on different sequences of the held-out "
            "documents: part of a difference in loss is that."
        )
    sizes = [run.info.get("parameters") for run in runs]
    if any(size != sizes[0] for size in sizes):
        sentences.append("The runs trained models of different sizes.")
    return sentences


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by dotted name; a list is a leaf."""
    if not isinstance(value, dict):
        return {prefix: value}
    names = {key: f"{prefix}.{key}" if prefix else str(key) for key in value}
    return {name: leaf for key, child in value.items() for name, leaf in flatten(child, names[key]).items()}

"""Compatibility of a checkpoint with the run that continues from it: the keys on record, and the comparison of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from sepllm_train.base.errors import UserError
from sepllm_train.base.shapes import Range
from sepllm_train.config.compatibility import (
    BLEND_ORDER,
    DATA,
    EARLIER_DATA,
    LATEST_BLEND_ORDER,
    MUON,
    ROTARY_SCALING,
    TOKENIZER,
    VALIDATION_DATA,
    VALIDATION_FRACTION,
    VOCABULARY,
    same_data,
    source_differences,
)
from sepllm_train.config.curriculum import batch_schedule_of, curriculum_of
from sepllm_train.config.param_groups import muon_matrices
from sepllm_train.config.schema import AttentionConfig, Config
from sepllm_train.model.pattern import tiers_of_classes

_DATA_SHAPE = {str: {"sha256": str, "weight": Range(high=1e300, whole=False)}}
_HELD_OUT = Range(0, 1, whole=False)
# What the identity on record holds where it holds it. Other keys are settings, compared as they are.
IDENTITY_SHAPE = {
    f"{DATA}?": _DATA_SHAPE,
    f"{VALIDATION_DATA}?": {str: (str, dict)},
    f"{VALIDATION_FRACTION}?": _HELD_OUT,
    f"{TOKENIZER}?": str,
    f"{VOCABULARY}?": Range(1, 1 << 40),
    f"{ROTARY_SCALING}?": dict,
    f"{MUON}?": [str],
    f"{EARLIER_DATA}?": [{"data": _DATA_SHAPE, "validation_fraction": _HELD_OUT}],
}
_DATA_KEYS = (DATA, VALIDATION_DATA, VALIDATION_FRACTION)
_SEPARATORS = "attention.separators"
# Attention settings that change nothing of what is trained: separators=auto is a list of classes by then.
_NOT_COUNTED = ("backend", "density_budget")
# Of the model, what changes nothing of it; the vocabulary is on record as it came to be.
_NOT_OF_THE_MODEL = ("name", "vocabulary", "recipe", "rotary_scaling")
_CONTENT = {"sha256": "other tokens", "index": "other document boundaries", "separators": "other separators"}
# On record only where there is one.
_BATCHES = "training.batch_schedule"
# Keys that came later, with what every run had before.
_BEFORE: dict[str, Any] = {
    VALIDATION_DATA: {},
    "model.init_output_std": None,
    "data.order": "shuffled",
    "data.mask_boundary_loss": False,
    "attention.restart_positions": False,
    "attention.window_choices": None,
    "attention.placement": "natural",
    "attention.keep_share": None,
    "training.curriculum": [],
    "init_from": None,
    "optim.optimizer": "adam",
    "optim.groups": [],
    "optim.schedule_steps": None,
    "optim.schedule_start": 0,
    _BATCHES: [],
    MUON: [],
}


def identity(
    config: Config,
    vocabulary: int,
    data: dict[str, Any],
    tokenizer: str,
    validation: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Values by key that a checkpoint must have in common with the run that continues from it.

    data, validation: `Corpus.identity` and `Corpus.validation_identity`; tokenizer: hash of its file.
    """
    model = {key: value for key, value in asdict(config.model).items() if key not in _NOT_OF_THE_MODEL}
    return {
        **{f"model.{key}": value for key, value in model.items()},
        # Only where there is one: older records have no such key.
        **({ROTARY_SCALING: scaling} if (scaling := config.model.rotary_scaling.record()) else {}),
        VOCABULARY: vocabulary,
        **{f"attention.{key}": value for key, value in asdict(config.attention).items() if key not in _NOT_COUNTED},
        DATA: data,
        VALIDATION_DATA: validation or {},
        **({BLEND_ORDER: LATEST_BLEND_ORDER} if len(data) > 1 else {}),
        TOKENIZER: tokenizer,
        "data.order": config.data.order,
        "data.mask_boundary_loss": config.data.mask_boundary_loss,
        "data.sequence_length": config.data.sequence_length,
        VALIDATION_FRACTION: config.data.validation_fraction,
        "seed": config.seed,
        "init_from": config.init_from,
        "training.global_batch": config.training.global_batch,
        "training.precision": config.training.precision,
        "training.curriculum": curriculum_of(config),
        **({_BATCHES: batches} if (batches := batch_schedule_of(config)) else {}),
        **({MUON: list(matrices)} if (matrices := muon_matrices(config)) else {}),
    }


def schedule_identity(config: Config) -> dict[str, Any]:
    """Values by key that a run which is continued in place must keep besides: length and optimizer settings."""
    optim = {f"optim.{key}": value for key, value in asdict(config.optim).items()}
    return {**optim, "training.steps": config.training.steps}


def earlier_data(found: dict[str, Any], wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """Data that was trained on before that of `wanted`, the earliest first, with the fraction of it that was held out.

    found: identity of the checkpoint that the run continues from.
    """
    *earlier, last = trained_on(found)
    return earlier if same_data(last, _own_data(wanted)) else [*earlier, last]


def blend_order(found: dict[str, Any], step: int) -> int:
    """Order in which the run of a checkpoint of identity `found` blends its data sources, which a run that continues
    from it keeps. Before the first step it is the latest."""
    return int(found.get(BLEND_ORDER, 1)) if step else LATEST_BLEND_ORDER


def trained_on(identity: dict[str, Any]) -> list[dict[str, Any]]:
    """All data that the weights of a checkpoint have seen, as `earlier_data`, that of its own run last."""
    return [*identity.get(EARLIER_DATA, []), _own_data(identity)]


def _own_data(identity: dict[str, Any]) -> dict[str, Any]:
    return {"data": identity.get(DATA, {}), "validation_fraction": identity.get(VALIDATION_FRACTION, 0.0)}


def check_unseen(found: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """Raise UserError when a run would be validated on text that the checkpoint at `where` was trained on.

    found, wanted: identities of the checkpoint and of the run.
    """
    for seen in trained_on(found):
        hashes = {entry["sha256"] for entry in seen["data"].values()}
        again = [name for name, entry in wanted.get(VALIDATION_DATA, {}).items() if _tokens(entry) in hashes]
        if again:
            raise UserError(f"data.validation_prefixes: {where} was trained on {again[0]}; validate on other text.")
        again = [name for name, entry in wanted[DATA].items() if entry["sha256"] in hashes]
        fraction = wanted[VALIDATION_FRACTION]
        if again and fraction > seen["validation_fraction"]:
            raise UserError(
                f"data.validation_fraction={fraction:g} would validate on documents of {again[0]} that {where} was "
                f"trained on: it held out {seen['validation_fraction']:g}."
            )


def check_identity(
    found: dict[str, Any],
    wanted: dict[str, Any],
    where: str,
    remedy: str,
    *,
    other_data: bool = False,
    data_remedy: str = "",
) -> None:
    """Raise UserError naming the first key whose value in the checkpoint at `where` is not the wanted one.

    other_data: the data and what of it is validated on may differ, but for the tokenizer; data_remedy: what to add to
    `remedy` when they do and may not.
    """
    # `wanted` may also be the schedule, of which no record has these.
    found, wanted = {**_BEFORE, **found}, {_BATCHES: [], MUON: [], ROTARY_SCALING: None, **wanted}
    for key, value in json.loads(json.dumps(wanted)).items():
        before = found.get(key)
        # A run that continues keeps the order of the checkpoint: see `blend_order`.
        if key == BLEND_ORDER or same_data(before, value):
            continue
        if key == _SEPARATORS and _same_separators(before, value):
            continue
        if other_data and key in _DATA_KEYS:
            continue
        if key == DATA:
            difference = _data_difference(before or {}, value)
        elif key == VALIDATION_DATA:
            difference = f"data.validation_prefixes of {_names(before or {})}, this run has {_names(value)}"
        elif key == TOKENIZER:
            difference = f"a tokenizer of SHA-256 {_short(before)}, this run has one of {_short(value)}"
        elif key == MUON:
            names = (", ".join(matrices or []) or "no matrices" for matrices in (before, value))
            difference = "Muon for {}, this run has it for {}".format(*names)
        else:
            difference = f"{key}={before}, this run has {value}"
        raise UserError(f"{where} was written with {difference}: {remedy}{data_remedy if key in _DATA_KEYS else ''}.")


def _same_separators(one: Any, other: Any) -> bool:
    """True when two values of attention.separators give classes the same tiers: `paper` is the names it stands for."""
    try:
        (horizons, tiers), (other_horizons, other_tiers) = (
            tiers_of_classes(AttentionConfig(pattern="sep", separators=value)) for value in (one, other)
        )
    except UserError:
        # Names that are no longer known.
        return False
    return horizons == other_horizons and bool((tiers == other_tiers).all())


def _tokens(entry: dict[str, Any] | str) -> str:
    """Hash of the tokens of a dataset that is validated on, from a record of any age."""
    return entry if isinstance(entry, str) else str(entry["sha256"])


def _names(validation: dict[str, Any]) -> str:
    """Datasets that are validated on, each with the first digits of its hashes of tokens, documents and separators."""
    keys = ("sha256", "index", "separators")

    def hashes(entry: dict[str, Any] | str) -> str:
        record = {"sha256": entry} if isinstance(entry, str) else entry
        return ", ".join(_short(record[key]) for key in keys if key in record)

    return ", ".join(f"{name} (SHA-256 {hashes(entry)})" for name, entry in validation.items()) or "none"


def _data_difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """First difference between the data of a checkpoint and that of this run (`Corpus.identity`)."""
    if found.keys() != wanted.keys():
        before, now = (", ".join(sources) or "none" for sources in (found, wanted))
        return f"the data sources {before}, this run has {now}"
    name, key = next((name, key) for name in found for key in source_differences(found[name], wanted[name]))
    before, now = found[name].get(key), wanted[name].get(key)
    if key == "weight":
        return f"weight {before:g} of the data source {name}, this run has {now:g}"
    if key == "packing":
        return f"each sequence of the data source {name} taken for a document, this run takes its documents"
    return f"{_CONTENT[key]} in the data source {name}: their SHA-256 is {_short(before)}, this run has {_short(now)}"


def _short(sha256: str | None) -> str:
    """The first digits of a hash."""
    return f"{sha256[:12]}..." if sha256 else "none"

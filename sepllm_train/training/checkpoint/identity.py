"""What a checkpoint must have in common with the run that continues from it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from sepllm_train.config.curriculum import curriculum_of
from sepllm_train.config.schema import Config
from sepllm_train.errors import UserError

# Attention settings that change nothing of what is trained: separators=auto is a list of classes by then.
_NOT_COUNTED = ("backend", "density_budget")
# Keys that came later, with what every run had before.
_BEFORE: dict[str, Any] = {
    "attention.window_choices": None,
    "attention.placement": "natural",
    "attention.keep_share": None,
    "training.curriculum": [],
    "init_from": None,
    "optim.schedule_steps": None,
    "optim.schedule_start": 0,
}


def identity(config: Config, vocabulary: int, data: dict[str, Any], tokenizer: str) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that continues from it, by configuration key."""
    return {
        **{f"model.{key}": value for key, value in asdict(config.model).items() if key not in ("name", "vocabulary")},
        "model.vocabulary": vocabulary,
        **{f"attention.{key}": value for key, value in asdict(config.attention).items() if key not in _NOT_COUNTED},
        "data (hash of the tokens)": data,
        "data (hash of the tokenizer)": tokenizer,
        "data.sequence_length": config.data.sequence_length,
        "data.validation_fraction": config.data.validation_fraction,
        "seed": config.seed,
        "init_from": config.init_from,
        "training.global_batch": config.training.global_batch,
        "training.precision": config.training.precision,
        "training.curriculum": curriculum_of(config),
    }


def schedule_identity(config: Config) -> dict[str, Any]:
    """What a run that is continued in place must keep besides: length and optimizer settings."""
    optim = {f"optim.{key}": value for key, value in asdict(config.optim).items()}
    return {**optim, "training.steps": config.training.steps}


def check_identity(found: dict[str, Any], wanted: dict[str, Any], where: str, remedy: str) -> None:
    """Raise UserError naming the first key whose value in the checkpoint at `where` is not the wanted one."""
    found = {**_BEFORE, **found}
    for key, value in json.loads(json.dumps(wanted)).items():
        if found.get(key) != value:
            raise UserError(f"{where} was written with {key}={found.get(key)}, this run has {value}: {remedy}.")

"""Counts of runs that were written when FLOPs and parameters included the padding of the vocabulary.

The padding, to a multiple of 128 times the tensor parallelism, is no part of the model: the same model in another
layout had other counts, and a run that resumed in another layout jumped. Here such counts become those that a run
records today. They are recognised exactly, by what their difference is made of, and any other count is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from sepllm_train.base.errors import UserError
from sepllm_train.config.compatibility import VOCABULARY
from sepllm_train.config.schema import ModelConfig
from sepllm_train.metrics.flops import FlopsCounter, parameter_count, shape_of

# Padding was to a multiple of this, times the tensor parallelism.
_MULTIPLE = 128

Record = dict[str, Any]


def without_padding(info: Record) -> tuple[Record, Callable[[Record], Record]]:
    """run.json without the padding in its parameters, and the function that takes it out of a record's FLOPs.

    Where run.json does not record the model, nothing is changed.
    """
    model, vocabulary = _model(info.get("identity"))
    phases = _phases(info)
    if model is None or phases is None:
        return info, dict
    counters = [(tokens, FlopsCounter(shape_of(model, vocabulary), length)) for tokens, length in phases]

    def corrected(record: Record) -> Record:
        tokens, counted = record.get("tokens"), record.get("flops/dense")
        if not isinstance(tokens, int) or not isinstance(counted, int) or tokens <= 0:
            return record
        excess = counted - _dense(counters, tokens)
        if not _is_padding(excess, 6 * model.hidden * tokens, vocabulary):
            return record
        return {**record, **{key: record[key] - excess for key in ("flops/model", "flops/dense") if key in record}}

    return _with_parameters(info, model, vocabulary), corrected


def _with_parameters(info: Record, model: ModelConfig, vocabulary: int) -> Record:
    counted, own = info.get("parameters"), parameter_count(model, vocabulary)
    each = model.hidden * (1 if model.tied_embeddings else 2)
    padded = isinstance(counted, int) and _is_padding(counted - own, each, vocabulary)
    return {**info, "parameters": own} if padded else info


def _is_padding(excess: int, each: int, vocabulary: int) -> bool:
    """True for `each` times a number of entries that fills `vocabulary` up to a multiple."""
    entries, rest = divmod(excess, each)
    return rest == 0 and entries > 0 and (vocabulary + entries) % _MULTIPLE == 0


def _dense(counters: list[tuple[int, FlopsCounter]], tokens: int) -> int:
    """flops/dense of the first `tokens` tokens of a run whose phases have the given tokens, the last one the rest."""
    total = 0
    for number, (most, counter) in enumerate(counters, 1):
        taken = tokens if number == len(counters) else min(tokens, most)
        total += counter.training(taken, 0)["flops/dense"]
        tokens -= taken
    return total


def _model(identity: Any) -> tuple[ModelConfig | None, int]:
    """Model and vocabulary of the `identity` in run.json; None where they are not recorded."""
    settings = identity if isinstance(identity, dict) else {}
    vocabulary = settings.get(VOCABULARY)
    known = {field.name for field in fields(ModelConfig)} - {"name", "vocabulary"}
    values = {key: settings[f"model.{key}"] for key in known if f"model.{key}" in settings}
    if not isinstance(vocabulary, int) or values.keys() < {"layers", "hidden", "heads", "ffn"}:
        return None, 0
    try:
        return ModelConfig(**values), vocabulary
    except (UserError, TypeError):
        return None, 0


def _phases(info: Record) -> list[tuple[int, int]] | None:
    """(tokens, sequence length) of each phase of a run; None where they are not recorded."""
    comparable, identity = info.get("comparable"), info.get("identity")
    length = comparable.get("sequence_length") if isinstance(comparable, dict) else None
    batch = identity.get("training.global_batch") if isinstance(identity, dict) else None
    curriculum = info.get("curriculum") or []
    if not isinstance(length, int) or not isinstance(batch, int) or not isinstance(curriculum, list):
        return None
    try:
        return [*((int(one["steps"]) * batch * length, int(one["length"])) for one in curriculum), (0, length)]
    except (KeyError, TypeError, ValueError):
        return None

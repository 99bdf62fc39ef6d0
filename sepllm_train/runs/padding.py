"""Counts of runs that were written when FLOPs and parameters included the padding of the vocabulary.

The padding, to a multiple of 128 times the tensor parallelism, is no part of the model: the same model in another
layout had other counts, and a run that resumed in another layout jumped. Here such counts become those that a run
records today. They are recognised exactly, by what their difference is made of, and any other count is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

from sepllm_train.base.errors import UserError
from sepllm_train.base.shapes import Range, misfit
from sepllm_train.config.compatibility import VOCABULARY, with_current_keys
from sepllm_train.config.schema import ModelConfig
from sepllm_train.metrics.flops import FlopsCounter, parameter_count, shape_of

# Padding was to a multiple of this, times the tensor parallelism.
_MULTIPLE = 128

_SIZE = Range(1, 1 << 40)
# What of a run's identity its counts depend on.
_MODEL = {
    VOCABULARY: _SIZE,
    **{f"model.{key}": _SIZE for key in ("layers", "hidden", "heads", "ffn")},
    "model.kv_heads?": (_SIZE, NoneType),
    **{f"model.{key}?": str for key in ("activation", "norm")},
    **{f"model.{key}?": bool for key in ("bias", "tied_embeddings")},
}
_PHASES = {
    "comparable": {"sequence_length": _SIZE},
    "identity": {"training.global_batch": _SIZE},
    "curriculum?": ([{"steps": _SIZE, "length": _SIZE}], NoneType),
}

Record = dict[str, Any]


def without_padding(info: Record) -> tuple[Record, Callable[[Record], Record]]:
    """run.json without the padding in its parameters, and the function that takes it out of a record's FLOPs.

    Where run.json does not record the model, nothing is changed.
    """
    model, vocabulary = _model(with_current_keys(info).get("identity"))
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
    if misfit(identity, _MODEL) is not None:
        return None, 0
    known = [name.removesuffix("?").removeprefix("model.") for name in _MODEL if name != VOCABULARY]
    values = {key: identity[f"model.{key}"] for key in known if f"model.{key}" in identity}
    vocabulary = identity[VOCABULARY]
    try:
        return ModelConfig(**values), vocabulary
    except UserError:
        return None, 0


def _phases(info: Record) -> list[tuple[int, int]] | None:
    """(tokens, sequence length) of each phase of a run; None where they are not recorded."""
    # Runs with a batch schedule are younger than these counts.
    if misfit(info, _PHASES) is not None or "batch_schedule" in info:
        return None
    length, batch = info["comparable"]["sequence_length"], info["identity"]["training.global_batch"]
    shorter = [(one["steps"] * batch * length, one["length"]) for one in info.get("curriculum") or []]
    return [*shorter, (0, length)]

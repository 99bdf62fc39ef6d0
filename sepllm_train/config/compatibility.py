"""Keys under which checkpoints and run.json record a run's data, beside the settings under their configuration keys.

A run may continue from a checkpoint, or be compared with another run, when these agree. Needs no torch.
"""

from __future__ import annotations

from typing import Any

# Data sources of training: {name: {sha256, weight, index, separators}}, where all but the weight are SHA-256 of files.
DATA = "data.tokens_sha256"
# Datasets of data.validation_prefixes, in the same way without weights: {name: SHA-256 of the tokens} in older records.
VALIDATION_DATA = "data.validation_tokens_sha256"
# Of several data sources, the order in which their samples are blended: 1 where there is none on record.
BLEND_ORDER = "data.blend_order"
LATEST_BLEND_ORDER = 2
# Tokenizer file of the data; empty for a model that was imported without one.
TOKENIZER = "data.tokenizer_sha256"
VALIDATION_FRACTION = "data.validation_fraction"
# Data of earlier steps, where a run resumed from a checkpoint of other data: [{data, validation_fraction}].
EARLIER_DATA = "data.earlier"
VOCABULARY = "model.vocabulary"
# Scaling of rotary positions, where there is one: the values that are set, by key.
ROTARY_SCALING = "model.rotary_scaling"
ROTARY_BASE = "model.rotary_base"
# Matrices of the layers that Muon updates, by their names in a layer; not on record where there are none.
MUON = "optim.muon"

# Later additions to the record of a data source: document boundaries and separators. With them, the weight is exact.
_LATER = ("index", "separators")

# Keys of checkpoints and runs that were written before these had names.
_OLD = {
    "data (hash of the tokens)": DATA,
    "data.validation_prefixes (hash of the tokens)": VALIDATION_DATA,
    "data (hash of the tokenizer)": TOKENIZER,
    "earlier data (hash of the tokens)": EARLIER_DATA,
}


def with_current_keys(stored: dict[str, Any]) -> dict[str, Any]:
    """Content of a state.json or run.json of any age, with the current keys in its `identity`."""
    identity = stored.get("identity")
    if not isinstance(identity, dict):
        return stored
    return {**stored, "identity": {_OLD.get(key, key): value for key, value in identity.items()}}


def same_data(one: Any, other: Any) -> bool:
    """True when two records of data, or values that hold some, do not contradict each other.

    Records that are older than some of their keys are compared in the keys that both have.
    """
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_data, one, other))
    one, other = _as_source(one, other), _as_source(other, one)
    if not isinstance(one, dict) or not isinstance(other, dict):
        return bool(one == other)
    if "sha256" in one and "sha256" in other:
        return not source_differences(one, other)
    return one.keys() == other.keys() and all(same_data(one[key], other[key]) for key in one)


def source_differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys in which the records of two data sources contradict each other."""
    exact = all(_LATER[0] in record for record in (one, other))

    def differ(key: str) -> bool:
        if key in _LATER and (key not in one or key not in other):
            return False
        here, there = one.get(key), other.get(key)
        if key == "weight" and not exact and isinstance(here, int | float) and isinstance(there, int | float):
            return round(here, 6) != round(there, 6)
        return bool(here != there)

    return [key for key in dict.fromkeys([*one, *other]) if differ(key)]


def _as_source(value: Any, other: Any) -> Any:
    """A hash as the record of a data source, where `other` is one."""
    return {"sha256": value} if isinstance(value, str) and isinstance(other, dict) and "sha256" in other else value

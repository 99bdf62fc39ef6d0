"""Keys under which checkpoints and run.json record a run's data, beside the settings under their configuration keys.

A run may continue from a checkpoint, or be compared with another run, when these agree. Needs no torch.
"""

from __future__ import annotations

from typing import Any

# Data sources of training: {name: {sha256, weight}}.
DATA = "data.tokens_sha256"
# Datasets of data.validation_prefixes: {name: SHA-256 of the tokens}.
VALIDATION_DATA = "data.validation_tokens_sha256"
# Tokenizer file of the data; empty for a model that was imported without one.
TOKENIZER = "data.tokenizer_sha256"
VALIDATION_FRACTION = "data.validation_fraction"
# Data of earlier steps, where a run resumed from a checkpoint of other data: [{data, validation_fraction}].
EARLIER_DATA = "data.earlier"
VOCABULARY = "model.vocabulary"

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

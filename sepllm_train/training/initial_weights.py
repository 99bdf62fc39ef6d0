"""Starting a run from another's weights: post-training with another attention pattern, or on other data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sepllm_train.base.console import note
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import hash_file
from sepllm_train.base.parsing import read_json_if_any
from sepllm_train.base.shapes import require_shape
from sepllm_train.config.compatibility import ROTARY_BASE, ROTARY_SCALING, TOKENIZER
from sepllm_train.config.rotary import in_words
from sepllm_train.config.schema import Config
from sepllm_train.training import checkpoint
from sepllm_train.training.checkpoint.files import MANIFEST, STATE
from sepllm_train.training.setup import Training

_WEIGHTS_OF_ATTENTION = ("attention.sink", "attention.qk_norm")
_POSITIONS = (ROTARY_BASE, ROTARY_SCALING)


def find_initial_weights(config: Config, identity: dict[str, Any]) -> Path | None:
    """The checkpoint that init_from names; None without one. identity: of this run.

    Raises UserError when there is none, or its weights are not those of this run's model and vocabulary.
    """
    if config.init_from is None:
        return None
    folder = Path(config.init_from).expanduser()
    if (folder / "config.json").is_file():
        raise UserError(
            f"init_from={config.init_from} is a transformers model: make a run of it with "
            f"`sepllm import {config.init_from} OUTPUT`, and give init_from=OUTPUT."
        )
    damaged: dict[Path, str] = {}
    found = checkpoint.find(config.init_from, damaged, key="init_from")
    for skipped, reason in damaged.items():
        note(f"skipped the damaged checkpoint {skipped} ({reason})")
    stored = checkpoint.read_state(found)["identity"]
    require_shape(stored, {TOKENIZER: str}, found / STATE, "name another checkpoint")
    for key, value in identity.items():
        # Other positions are how a context is extended.
        weights = key.startswith("model.") and not key.startswith("model.init") and key not in _POSITIONS
        if (weights or key in _WEIGHTS_OF_ATTENTION) and stored.get(key) != value:
            raise UserError(f"init_from={config.init_from} has {key}={stored.get(key)}, this run {value}: set it so.")
    # A model that was imported without a tokenizer has none on record.
    if stored[TOKENIZER] not in ("", identity[TOKENIZER]):
        raise UserError(
            f"init_from={config.init_from} was trained with another tokenizer than this run's data: prepare the text "
            "with its own."
        )
    return found


def changed_positions(found: Path, identity: dict[str, Any]) -> str | None:
    """Line on rotary positions that are other than those of the checkpoint `found`; None where they are the same.
    identity: of this run."""
    stored = checkpoint.read_state(found)["identity"]
    changes = []
    if stored.get(ROTARY_BASE) != identity[ROTARY_BASE]:
        changes.append(f"{ROTARY_BASE} {stored.get(ROTARY_BASE)} -> {identity[ROTARY_BASE]}")
    before, now = (one.get(ROTARY_SCALING) for one in (stored, identity))
    if before != now:
        changes.append(f"{ROTARY_SCALING} {in_words(before)} -> {in_words(now)}")
    if not changes:
        return None
    return f"init_from: other rotary positions than those its weights were trained with: {' | '.join(changes)}"


def load_initial_weights(found: Path, training: Training) -> None:
    """Fill the model, and the optimizer's copy of it; Adam's moments stay zero. Every rank calls it.

    Raises UserError when the checkpoint cannot be read as this model's.
    """
    if (reason := checkpoint.altered_on_any_rank(found)) is not None:
        raise UserError(f"init_from: the checkpoint {found} is damaged, {reason}: take another.")
    checkpoint.load_weights(found, training.modules)
    training.optimizer.reload_model_params()


def initial_record(found: Path | None, resumed: Path | None) -> dict[str, Any] | None:
    """Record in run.json of the weights that a run began with: path of the checkpoint, its step and tokens, and the
    hash of its manifest, which holds those of all its files. None without any.

    found: the checkpoint, when the run begins; resumed: the one it continues from, whose run has it on record.
    """
    if resumed is not None:
        # It may be another run's folder, whose record is not what this run stands on.
        recorded = read_json_if_any(resumed.parent.parent / "run.json").get("initial_weights")
        return recorded if isinstance(recorded, dict) else None
    if found is None:
        return None
    state = checkpoint.read_state(found)["state"]
    return {
        "checkpoint": str(found.resolve()),
        "step": state["step"],
        "tokens": state["tokens"],
        "manifest_sha256": hash_file(found / MANIFEST).sha256,
    }

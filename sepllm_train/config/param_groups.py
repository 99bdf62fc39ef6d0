"""Parameter groups: optimizer, learning rate and weight decay of each parameter, chosen by its name. Needs no torch.

Names are those of an unsplit model, with layers counted from 0: decoder.layers.0.mlp.linear_fc1.weight.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from sepllm_train.config.schema import OPTIMIZERS, Config, ModelConfig

_KEYS = ("match", "lr_factor", "weight_decay", "optimizer")
_LAYERS = "decoder.layers."
# Names that an error message lists.
_SHOWN = 3


@dataclass(frozen=True)
class ParamSettings:
    """Settings of the update of a parameter. `weight_decay` None: optim.weight_decay for matrices, 0 for all else."""

    optimizer: str
    lr_factor: float
    weight_decay: float | None


def layer_matrices(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Shapes [out, in] of a layer's matrices by their names within the layer."""
    query, key = model.heads * model.head_dim, model.query_groups * model.head_dim
    return {
        "self_attention.linear_qkv.weight": (query + 2 * key, model.hidden),
        "self_attention.linear_proj.weight": (model.hidden, query),
        "mlp.linear_fc1.weight": (model.ffn * (2 if model.activation == "swiglu" else 1), model.hidden),
        "mlp.linear_fc2.weight": (model.hidden, model.ffn),
    }


def parameter_names(config: Config) -> list[str]:
    """Names of all trained parameters; a tied output layer is the embedding."""
    model, attention = config.model, config.attention
    norm = ("weight", "bias") if model.norm == "layernorm" else ("weight",)
    norms = ["input_layernorm", "pre_mlp_layernorm"]
    norms += ["self_attention.q_layernorm", "self_attention.k_layernorm"] if attention.qk_norm else []
    layer = [*layer_matrices(model), *(f"{name}.{part}" for name in norms for part in norm)]
    layer += [name.replace(".weight", ".bias") for name in layer_matrices(model)] if model.bias else []
    layer += ["self_attention.core_attention.sink"] if attention.sink == "learned" else []
    return [
        "embedding.word_embeddings.weight",
        *(f"{_LAYERS}{number}.{name}" for number in range(model.layers) for name in layer),
        *(f"decoder.final_layernorm.{part}" for part in norm),
        *([] if model.tied_embeddings else ["output_layer.weight"]),
    ]


def param_settings(config: Config, name: str) -> ParamSettings:
    """Settings of the parameter `name`: of the first entry of optim.groups that matches it, else of `optim`."""
    entry = _entry_of(config, name) or {}
    usual = config.optim.optimizer if _within_layer(name) in layer_matrices(config.model) else "adam"
    return ParamSettings(entry.get("optimizer", usual), entry.get("lr_factor", 1.0), entry.get("weight_decay"))


def muon_matrices(config: Config) -> dict[str, tuple[int, int]]:
    """The matrices of `layer_matrices` that Muon updates, in every layer."""
    return {
        name: shape
        for name, shape in layer_matrices(config.model).items()
        if param_settings(config, f"{_LAYERS}0.{name}").optimizer == "muon"
    }


def muon_flops(shape: tuple[int, int], steps: int = 5) -> int:
    """FLOPs of orthogonalising a matrix of `shape` by `steps` iterations of three products each."""
    short, long = sorted(shape)
    return steps * (4 * short * short * long + 2 * short**3)


def group_sizes(config: Config) -> list[tuple[dict[str, Any], int]]:
    """Entries of optim.groups, each with the number of parameters (tensors) that it applies to."""
    entries = [_entry_of(config, name) for name in parameter_names(config)]
    return [(group, sum(entry is group for entry in entries)) for group in config.optim.groups]


def check_param_groups(config: Config) -> Iterator[tuple[bool, str]]:
    """(whether it holds, message otherwise) of every condition on optim.optimizer and optim.groups."""
    mistakes = [message for entry in config.optim.groups if (message := _mistake_of_entry(entry))]
    yield from ((False, message) for message in mistakes)
    if mistakes:
        return
    for group, size in group_sizes(config):
        yield size > 0, f"optim.groups: {_no_match(config, group)}"
    settings = {name: param_settings(config, name) for name in parameter_names(config)}
    muon = {name for name, found in settings.items() if found.optimizer == "muon"}
    strange = {_any_layer(name): name for name in muon if _within_layer(name) not in layer_matrices(config.model)}
    yield (
        not strange,
        f"optim.groups: optimizer=muon for {_listed(sorted(strange))}: Muon makes the update of a layer's matrix "
        "orthogonal, and norms, biases, sinks, the embedding and the output layer are none; leave them to Adam with a "
        f"narrower match, such as *.{next(iter(layer_matrices(config.model)))}.",
    )
    layers = config.model.layers
    partly = [
        name for name in layer_matrices(config.model) if 0 < sum(one.endswith(f".{name}") for one in muon) < layers
    ]
    yield (
        not partly,
        f"optim.groups: {_listed([f'{_LAYERS}*.{name}' for name in partly])} would be Muon's in some layers and Adam's "
        "in others, and checkpoints keep the state of all layers as one tensor: choose the optimizer for all layers.",
    )
    yield (
        not muon or not config.parallel.sharded_optimizer,
        "parallel.sharded_optimizer=true cuts gradients into flat pieces, and Muon needs whole matrices: set "
        "parallel.sharded_optimizer=false, or optim.optimizer=adam without optimizer=muon in optim.groups.",
    )


def _mistake_of_entry(entry: Any) -> str | None:
    """Message on an entry of optim.groups that is not of its form, or None."""
    form = "{match: PATTERN, lr_factor: X, weight_decay: X, optimizer: adam or muon}, of which match and one more"
    if not isinstance(entry, dict) or not isinstance(entry.get("match"), str) or len(entry) < 2:
        return f"optim.groups entry {entry} must be {form} are needed."
    where = f"optim.groups entry {entry['match']}"
    for key, value in entry.items():
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            return f"{where}: there is no key {key}{f' (did you mean {near[0]}?)' if near else ''}; it may be {form}."
        if key == "optimizer" and value not in OPTIMIZERS:
            return f"{where}: optimizer={value} is unknown: choose one of {', '.join(OPTIMIZERS)}."
        if key in ("lr_factor", "weight_decay"):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value >= 0):
                return f"{where}: {key}={value} must be a number of 0 or more."
    return None


def _no_match(config: Config, group: dict[str, Any]) -> str:
    """Message on an entry that applies to no parameter."""
    pattern, names = group["match"], parameter_names(config)
    if any(fnmatchcase(name, pattern) for name in names):
        return f"match={pattern} never applies: entries before it take all that it matches; put it before them."
    known = list(dict.fromkeys(map(_any_layer, names)))
    near = difflib.get_close_matches(pattern, known, n=_SHOWN, cutoff=0.0)
    return f"match={pattern} matches no parameter of this model; the nearest are {', '.join(near)}."


def _entry_of(config: Config, name: str) -> dict[str, Any] | None:
    """The first entry of optim.groups that matches a parameter's name."""
    return next((entry for entry in config.optim.groups if fnmatchcase(name, entry["match"])), None)


def _within_layer(name: str) -> str:
    """Name of a layer's parameter without the layer; "" for others."""
    return name.removeprefix(_LAYERS).partition(".")[2] if name.startswith(_LAYERS) else ""


def _any_layer(name: str) -> str:
    """Name of a parameter with * for the number of its layer."""
    return re.sub(r"^decoder\.layers\.\d+\.", f"{_LAYERS}*.", name)


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")

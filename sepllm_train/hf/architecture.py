"""Configurations of models on both sides: classes of transformers that compute exactly what a model of ours does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sep_attention import FOREVER

from data_prep.separators import CLASSES
from sepllm_train.base.errors import UserError, first_line
from sepllm_train.base.parsing import read_json
from sepllm_train.config.rotary import RotaryScalingConfig
from sepllm_train.config.schema import AttentionConfig, Config, ModelConfig, require
from sepllm_train.config.stored import from_mapping
from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.hf.weights import LLAMA, NEOX, QWEN3, Family

_MOST = {"num_hidden_layers": 10_000, "vocab_size": 1 << 26}
FAMILIES: dict[str, Family] = {"gpt_neox": NEOX, "llama": LLAMA, "mistral": LLAMA, "qwen3": QWEN3}
# Scalings of rotary positions that both sides have by the same names.
ROPE_TYPES = ("linear", "yarn", "llama3")
# model.activation and transformers' names of it, the one that is exported first.
GELUS = {"gelu": ("gelu",), "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")}


def model_type(config: Config) -> str:
    """transformers' name of the architecture of a run. Raises UserError where none of its classes has this block."""
    model, attention = config.model, config.attention
    require(
        attention.sink == "none",
        "attention.sink=learned cannot be exported: no class of transformers has this sink in its softmax.",
    )
    require(model.rotary_fraction > 0, "model.rotary_fraction=0 cannot be exported: transformers' classes all rotate.")
    if (model.norm, model.bias) == ("layernorm", True) and model.activation in GELUS:
        require(
            model.query_groups == model.heads,
            f"model.kv_heads={model.kv_heads} cannot be exported with model.norm=layernorm: GPT-NeoX has as many "
            "key-value heads as heads.",
        )
        require(
            not attention.qk_norm, "attention.qk_norm=true cannot be exported with GPT-NeoX, which has no such norm."
        )
        return "gpt_neox"
    if (model.norm, model.activation, model.bias) == ("rmsnorm", "swiglu", False):
        require(
            not model.parallel_residual,
            "model.parallel_residual=true cannot be exported with model.norm=rmsnorm: Llama's layers are sequential.",
        )
        require(
            model.rotary_fraction == 1,
            f"model.rotary_fraction={model.rotary_fraction} cannot be exported with model.norm=rmsnorm: Llama rotates "
            "all features.",
        )
        return "qwen3" if attention.qk_norm else "llama"
    raise UserError(
        f"model.norm={model.norm} with model.activation={model.activation} and model.bias={str(model.bias).lower()} "
        "cannot be exported: transformers has layernorm, gelu and bias (GPT-NeoX), or rmsnorm, swiglu and no bias "
        "(Llama)."
    )


def to_theirs(config: Config, vocabulary: int, end_of_document: int) -> Any:
    """transformers' configuration of a run's model. Raises UserError as `model_type` does."""
    from transformers import AutoConfig

    model, kind = config.model, model_type(config)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rotary_theta)}
    # The base is all of ntk.
    if model.rotary_scaling.rope_type != "ntk":
        rope |= model.rotary_scaling.record()
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": model.ffn,
        "max_position_embeddings": config.data.sequence_length,
        "tie_word_embeddings": model.tied_embeddings,
        # Training puts the token between documents, so it also begins them.
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
        "attention_dropout": 0.0,
    }
    if kind == "gpt_neox":
        rope["partial_rotary_factor"] = model.rotary_fraction
        settings |= {
            "hidden_act": GELUS[model.activation][0],
            "layer_norm_eps": model.norm_epsilon,
            "use_parallel_residual": model.parallel_residual,
        }
    else:
        settings |= {
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_epsilon,
            "num_key_value_heads": model.query_groups,
            "head_dim": model.head_dim,
        }
    return AutoConfig.for_model(kind, **settings, rope_parameters=rope)


def read_theirs(folder: Path) -> Any:
    """transformers' configuration in a folder. Raises UserError when it is not there or of an unknown kind."""
    from transformers import AutoConfig

    path = folder / "config.json"
    content = read_json(path, "give the folder of a transformers model", nan=True)
    kind = content.get("model_type")
    require(
        isinstance(kind, str) and kind in FAMILIES,
        f"{path} is of a {kind} model: those that can be imported are {', '.join(FAMILIES)}.",
    )
    for key, most in _MOST.items():
        value = content.get(key, 1)
        # transformers makes lists of so many entries.
        require(type(value) is int and 1 <= value <= most, f"{path} has {key}={repr(value)[:40]}, which no model has.")
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises errors of many kinds
        raise UserError(f"{path} is not a configuration of transformers ({first_line(error)}).") from None


def to_ours(theirs: Any, name: str) -> tuple[ModelConfig, bool]:
    """Our configuration of a model of theirs, and whether it normalises queries and keys.

    Raises UserError for what our model does not have, and for values that are of no use.
    """
    try:
        return _to_ours(theirs, name)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(f"config.json has a value that cannot be used ({first_line(error)}).") from None


def _to_ours(theirs: Any, name: str) -> tuple[ModelConfig, bool]:
    neox = theirs.model_type == "gpt_neox"

    def equal(key: str, value: Any, why: str) -> None:
        found = getattr(theirs, key, value)
        require(found == value, f"{key}={found} in config.json cannot be imported: {why}.")

    rope = theirs.rope_parameters
    base = rope["rope_theta"]
    require(base == int(base), f"rope_theta={base} cannot be imported: model.rotary_base is a whole number.")
    fraction = rope.get("partial_rotary_factor", 1.0)
    if not neox:
        require(fraction == 1, f"partial_rotary_factor={fraction} cannot be imported with {theirs.model_type}.")
        equal(
            "head_dim", theirs.hidden_size // theirs.num_attention_heads, "our heads have hidden_size / heads features"
        )
        equal("mlp_bias", False, "our SwiGLU has no bias")
        window = getattr(theirs, "sliding_window", None)
        require(
            window is None or window >= theirs.max_position_embeddings,
            f"sliding_window={window} in config.json cannot be imported: the model is not one of full attention.",
        )
    activation = "swiglu"
    if neox:
        found = next((ours for ours, names in GELUS.items() if theirs.hidden_act in names), None)
        require(
            found is not None,
            f"hidden_act={theirs.hidden_act} in config.json cannot be imported: ours has GELU, exact or by tanh.",
        )
        activation = str(found)
    else:
        equal("hidden_act", "silu", "our Llama has SiLU")
    equal("attention_bias", neox, "GPT-NeoX has a bias in attention, Llama none")
    equal("quantization_config", None, "its weights are quantised")
    model = ModelConfig(
        name=name,
        layers=theirs.num_hidden_layers,
        hidden=theirs.hidden_size,
        heads=theirs.num_attention_heads,
        kv_heads=None if neox else theirs.num_key_value_heads,
        ffn=theirs.intermediate_size,
        parallel_residual=neox and theirs.use_parallel_residual,
        norm="layernorm" if neox else "rmsnorm",
        norm_epsilon=theirs.layer_norm_eps if neox else theirs.rms_norm_eps,
        activation=activation,
        bias=neox,
        rotary_fraction=fraction,
        rotary_base=int(base),
        rotary_scaling=_scaling(rope),
        tied_embeddings=theirs.tie_word_embeddings,
        vocabulary=theirs.vocab_size,
        init="pythia" if neox else "normal",
    )
    return model, theirs.model_type == "qwen3"


def _scaling(rope: dict[str, Any]) -> RotaryScalingConfig:
    """The scaling in rope_parameters. Raises UserError for a type or a number that ours has not."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return RotaryScalingConfig()
    require(
        kind in ROPE_TYPES,
        f"the scaled rotary embedding {kind} in config.json cannot be imported: ours are {', '.join(ROPE_TYPES)}.",
    )
    # `type` is the older name of rope_type, which transformers fills.
    others = ("rope_theta", "partial_rotary_factor", "type")
    numbers = {key: value for key, value in rope.items() if key not in others and value is not None}
    return from_mapping(
        RotaryScalingConfig, numbers, "config.json:", "it cannot be imported", group="model.rotary_scaling."
    )


def attention_of(pattern: TokenPattern, classes: np.ndarray | None) -> AttentionConfig | None:
    """The configuration that gives `pattern`, or None when no choice of separator classes does.

    classes: u8 [vocabulary], the separator class of each entry; None when that is not known.
    """
    settings: dict[str, Any] = {
        "initial_tokens": pattern.initial,
        "separate_documents": pattern.end_of_document is not None,
    }
    finite = [window for window in pattern.windows if window < FOREVER]
    if not finite:
        return AttentionConfig(pattern="dense", **settings)
    settings["full_layers"] = [n for n, window in enumerate(pattern.windows) if window >= FOREVER] or "none"
    # A full layer's window is not looked at.
    windows = [window if window < FOREVER else finite[0] for window in pattern.windows]
    settings["window"] = windows[0] if len(set(windows)) == 1 else windows
    if pattern.interval is not None:
        return AttentionConfig(pattern="fixed", interval=pattern.interval, **settings)
    if not pattern.separators:
        return AttentionConfig(pattern="streaming", **settings)
    groups = None if classes is None else _separators(pattern, classes)
    return None if groups is None else AttentionConfig(pattern="sep", separators=groups, **settings)


def _separators(pattern: TokenPattern, classes: np.ndarray) -> list[Any] | None:
    """Value of attention.separators, or None when a class has tokens in two tiers, or tokens of none are in one."""
    tiers = pattern.tier_of_token.numpy()
    if len(tiers) != len(classes):
        return None
    names: dict[int, list[str]] = {}
    for entry in CLASSES:
        (tier, *others) = np.unique(tiers[classes == entry.number]).tolist() or [0]
        if others:
            return None
        if tier:
            names.setdefault(tier, []).append(entry.name)
    if tiers[classes == 0].any():
        return None
    if set(names) == {1}:
        return names[1]
    horizons = {tier: "forever" if h >= FOREVER else h for tier, h in enumerate(pattern.horizons, 1)}
    return [{"classes": found, "horizon": horizons[tier]} for tier, found in sorted(names.items())]

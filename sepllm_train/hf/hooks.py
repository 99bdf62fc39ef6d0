"""The two hooks on a transformers model that announce the tokens of a forward to our caches and patterns.

They do nothing unless the call has one of our caches, or a pattern was put on the model.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from sepllm_train.generation.cache import SeparatorCache
from sepllm_train.hf.masks import Biases, additive

# Name of a forward's cache: the first from transformers 5.24 on, the second before.
CACHE_ARGUMENTS = ("cache", "past_key_values")

_MODELS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class TokenCache(SeparatorCache, Cache):
    """A separator cache that the hooks serve; `cache.SlotCache` is it."""

    # Columns of the forward that is running, which layers refuse any other than; -1 between forwards.
    pending: int
    # True while a piece of a longer forward is running; the hidden states of the pieces before it.
    running: bool
    pieces: list[Tensor]
    # The model without its head that the cache was made for.
    base: Callable[[], Any]


class LayerMasks:
    """State that the hooks of a model share.

    Attributes:
        given: arguments for each layer in the forward that is running; None while all layers share the model's mask.
        biases: of a model with ALiBi.
        tried: True once the model was found to suit our caches.
    """

    def __init__(self, biases: Biases | None) -> None:
        self.given: list[dict[str, Tensor]] | None = None
        self.biases = biases
        self.tried = False


class _GiveMask:
    """Hook before layer `number`."""

    def __init__(self, shared: LayerMasks, number: int) -> None:
        self.shared = shared
        self.number = number

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if self.shared.given is None:
            return None
        kwargs = _by_name(layer, args, kwargs)
        if "attention_mask" not in kwargs:
            raise ValueError(f"{type(layer).__name__} is not given a mask by name: its layers must all attend alike.")
        return (), {**kwargs, **self.shared.given[self.number]}


def attach(model: Any) -> Any:
    """Let our caches work with a transformers model, and give it back. A cache made with the model does this itself.

    The model is not changed but for a hook before its forward, one after, and one before each of its layers.
    """
    base = decoder_of(model)
    layers = layers_of(base)
    _MODELS[id(base.config)] = base
    # A copy of a model has its hooks already.
    if not any(hook is _before for hook in base._forward_pre_hooks.values()):
        base.register_forward_pre_hook(_before, with_kwargs=True)
        base.register_forward_hook(_after, with_kwargs=True)
        # Found again by these names, also in a deep copy of the model. The signature is read once: every call asks.
        base.sepllm_arguments = tuple(inspect.signature(base.forward).parameters)
        base.sepllm_layer_masks = LayerMasks(Biases.of(base))
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(_GiveMask(base.sepllm_layer_masks, number), with_kwargs=True)
    return model


def base_of(model: Any) -> Any:
    """The model without its head; for a config, that of the model with it that `attach` was called on.

    Raises ValueError when there is none.
    """
    if hasattr(model, "base_model"):
        return decoder_of(model)
    base = _MODELS.get(id(model))
    if base is None:
        raise ValueError(
            f"no model with this {type(model).__name__} was attached: call sepllm_train.hf.attach(model), or give the "
            "model in place of its config."
        )
    return base


def decoder_of(model: Any) -> Any:
    """The part of a model that takes ids and has the layers: its base model; or what that one has inside as `decoder`,
    which the heads of OPT and of decoders of translation models call in its place; or as `model`, where the base model
    goes by another name (Llama 4)."""
    # What PEFT calls the base model is its adapter.
    base = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
    for name in ("model", "decoder"):
        inner = getattr(base, name, None)
        if isinstance(inner, torch.nn.Module) and _takes(inner, "input_ids"):
            base = inner
    return base


def _before(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Cut the tokens where keys are dropped, run all pieces but the last, and let the model run that."""
    if getattr(cache_of(kwargs), "sepllm_static", False):
        return None
    # A forward that failed has left its masks.
    if not getattr(cache_of(kwargs), "running", False):
        base.sepllm_layer_masks.given = None

    kwargs = _by_name(base, args, kwargs)
    cache = cache_of(kwargs)
    if not isinstance(cache, TokenCache):
        pattern = getattr(base, "sepllm_pattern", None)
        return None if pattern is None else ((), pattern.prepare(base, kwargs))
    if cache.running:
        return None
    if cache.pending >= 0:
        raise RuntimeError("an earlier call with this cache failed half-way: call reset() on it.")
    ids, valid = tokens_of(kwargs)
    check_implementation(base)
    _check_call(base, cache, valid)
    cache.begin(len(ids), ids.device)
    cache.pieces = []
    start = 0
    while True:
        cache.make_room()
        end = start + cache.fits(ids[:, start:], valid[:, start:])
        positions, masks = cache.append(ids[:, start:end], valid[:, start:end])
        cache.pending = end - start
        piece = {**kwargs, "input_ids": ids[:, start:end], "use_cache": True} | position_argument(base, positions)
        keys = [cache.held[group].slots.position for group in cache.group_of_layer]
        piece["attention_mask"] = give_masks(base, masks, keys)
        if end == ids.shape[1]:
            return (), piece
        if start == 0:
            _check_whole(base, kwargs)
        cache.running = True
        try:
            cache.pieces.append(base(**piece)[0])
        finally:
            cache.running = False
        start = end


def _after(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Put the hidden states of the pieces together."""
    if getattr(cache_of(kwargs), "sepllm_static", False):
        return output
    cache = cache_of(_by_name(base, args, kwargs))
    told = kwargs.get("sepllm_forward")
    if told is not None and not torch.compiler.is_compiling() and len(told.layers_run) < len(told.pattern.windows):
        raise ValueError(
            f"{type(base).__name__} does not hand its attention what tells the pattern: apply_pattern(model, "
            "implementation='mask') works with any model."
        )
    if not isinstance(cache, TokenCache):
        base.sepllm_layer_masks.given = None
        return output
    if cache.running:
        return output
    base.sepllm_layer_masks.given = None
    cache.pending = -1
    pieces, cache.pieces = cache.pieces, []
    if not pieces:
        return output
    hidden = torch.cat((*pieces, output[0]), 1)
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output["last_hidden_state"] = hidden
    return output


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache of a call, None where it has none."""
    return next((kwargs[name] for name in CACHE_ARGUMENTS if kwargs.get(name) is not None), None)


def cache_argument(model: Any) -> str:
    """The name under which a model's forward takes its cache."""
    base = decoder_of(model)
    known = inspect.signature(base.forward).parameters
    name = next((name for name in CACHE_ARGUMENTS if name in known), None)
    if name is None:
        raise ValueError(f"{type(base).__name__} takes no cache of keys: it has states of another kind.")
    return name


def takes_cache(base: Any) -> bool:
    """True when a forward has an argument for a cache of keys."""
    return any(_takes(base, name) for name in CACHE_ARGUMENTS)


def position_argument(base: Any, positions: Tensor) -> dict[str, Tensor]:
    """Positions, i64 [B, N], as a forward takes them; nothing for a model that has no such argument."""
    return {"position_ids": positions} if _takes(base, "position_ids") else {}


def _takes(module: Any, name: str) -> bool:
    """True when a module's forward has an argument of that name."""
    return name in _names_of(module)


def _by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward by name."""
    if not args:
        return kwargs
    return {**dict(zip(_names_of(module), args, strict=False)), **kwargs}


def _names_of(module: Any) -> tuple[str, ...]:
    """Names of the arguments of a module's forward. Those of a model were noted by `attach`, since torch.compile does
    not know signatures."""
    kept = getattr(module, "sepllm_arguments", None)
    return tuple(inspect.signature(module.forward).parameters) if kept is None else kept


def _check_call(base: Any, cache: TokenCache, valid: Tensor) -> None:
    """Raise ValueError for a call that a cache cannot serve."""
    if cache.base() is not base:
        raise ValueError("the cache was made for another model: make one with the model it is given to.")
    if base.training and getattr(base, "gradient_checkpointing", False):
        raise ValueError("gradient checkpointing takes a model's cache away: call model.eval(), or switch it off.")
    if bool(valid.all()):
        return
    begun = len(cache.tokens) == len(valid) and bool(((cache.tokens > 0)[:, None] & ~valid).any())
    if bool((valid[:, :-1] & ~valid[:, 1:]).any()) or begun:
        raise ValueError("a row of the batch has padding after its first token: pad on the left.")


def _check_whole(base: Any, kwargs: dict[str, Any]) -> None:
    """Raise ValueError when a call that is cut into pieces asks for what only whole calls have."""
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.get(name) or (kwargs.get(name) is None and getattr(base.config, name, False)):
            raise ValueError(
                f"{name}=True tells of the last piece only, and the cache cuts this call where keys are dropped: give "
                "fewer tokens at once."
            )


def tokens_of(kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The ids of a call, i64 [B, N], and which of them are none of the padding, bool [B, N]."""
    ids = kwargs.get("input_ids")
    if ids is None:
        raise ValueError("the call has no input_ids: separators are found by the tokens' ids, not by embeddings.")
    mask = kwargs.get("attention_mask")
    if mask is None:
        return ids, torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"attention_mask is a {type(mask).__name__}, one mask for each kind of layer, and must be a tensor of two "
            "dimensions: the pattern and the cache make their own masks."
        )
    if mask.dim() != 2:
        raise ValueError(f"attention_mask has {mask.dim()} dimensions and must have 2: the cache makes its own mask.")
    return ids, mask[:, -ids.shape[1] :].bool()


def give_masks(base: Any, masks: list[Tensor], positions: list[Tensor]) -> Tensor:
    """The mask for the model's own argument, where all layers share it additive [B, 1, N, W]; where they differ, and
    where biases go with it, the hooks before the layers hand out what belongs to each.

    masks: bool [B, N, W] for each layer; positions: i64 [B, W], those of its keys, below 0 for none.
    """
    shared = base.sepllm_layer_masks
    if shared.biases is not None:
        made = {id(mask): shared.biases.arguments(base, mask, at) for mask, at in zip(masks, positions, strict=True)}
        shared.given = [made[id(mask)] for mask in masks]
        # Such models make their own biases of a mask of two dimensions.
        return torch.ones(len(masks[0]), masks[0].shape[-1], dtype=torch.int64, device=masks[0].device)
    added = {number: additive(mask, base.dtype) for number, mask in {id(mask): mask for mask in masks}.items()}
    shared.given = [{"attention_mask": added[id(mask)]} for mask in masks] if len(added) > 1 else None
    return added[id(masks[0])]


def chosen_keys(config: Any) -> int | None:
    """Keys beyond which layers of a transformers model hide some whatever mask they are given; None for most models."""
    if "local" in getattr(config, "attention_layers", ()):
        # GPT-Neo, in its attention.
        return config.window_size
    if getattr(config, "attention_type", None) == "block_sparse":
        # BigBird, which attends fully to as many.
        return (5 + 2 * config.num_random_blocks) * config.block_size
    # Doge, which keeps those that it finds best.
    return getattr(config, "keep_window_size", None)


def own_window(config: Any) -> int | None:
    """Tokens within which some layer of a transformers model attends whatever its cache holds; None for all."""
    chosen = chosen_keys(config)
    if chosen is not None:
        return chosen
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "chunked_attention" in kinds:
        return config.attention_chunk_size
    sliding = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True) if kinds is None else "sliding_attention" in kinds
    return sliding if used else None


def check_implementation(base: Any) -> None:
    used = base.config._attn_implementation
    if used not in ("eager", "sdpa", "sep", "sepllm"):
        raise ValueError(
            f"the model's attention is {used}, which takes no mask of its own: load it with attn_implementation='sdpa'."
        )


def layers_of(base: Any) -> list[Any]:
    """The decoder layers: the outermost list of as many modules. Raises ValueError when it is not found."""
    count = base.config.get_text_config().num_hidden_layers
    modules = [base]
    for module in modules:
        for child in module.children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == count == len(set(child)):
                return list(child)
            if not isinstance(child, torch.nn.ModuleList):
                modules.append(child)
    raise ValueError(f"{type(base).__name__} has no list of {count} layers: it is no decoder this package knows.")

"""A separator pattern on a transformers model: every forward attends by it, prompts and generation alike.

Shape letters: B rows (sequences), T tokens of which the last N are new, H heads, D features.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sep_attention import AttentionPlan, DecodeCache, attend, sep_attention, visible_mask
from sep_attention.plan import is_traced
from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from sepllm_train.base.errors import UserError
from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.hf.guard import ATTENTION
from sepllm_train.hf.hooks import (
    attach,
    cache_argument,
    cache_of,
    check_implementation,
    chosen_keys,
    decoder_of,
    give_masks,
    own_window,
    position_argument,
    takes_cache,
    tokens_of,
)
from sepllm_train.hf.probe import ModelTrial
from sepllm_train.hf.separators import CONFIG_KEY, trained_pattern

IMPLEMENTATIONS = ("auto", "kernel", "mask")
# Names of our attention among transformers': the one to ask for, and the one that exported models have in config.json.
SEP = "sep"
NAMES = (SEP, ATTENTION)


@dataclass
class Forward:
    """Arguments of the attention of each layer in a forward: the plan of its sequences, and the pattern's layers."""

    plan: AttentionPlan
    pattern: TokenPattern
    layers_run: set[int] = field(default_factory=set)


class PatternOnModel:
    """The pattern of a model, as the hook before its forward uses it."""

    def __init__(self, pattern: TokenPattern, kernel: bool, former: str) -> None:
        self.pattern = pattern
        self.kernel = kernel
        # The model's attention before.
        self.former = former

    def prepare(self, base: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward with what makes it attend by the pattern.

        Without a cache and with gradients it does not wait for the device, and torch.compile puts it in its graph.
        Raises ValueError for embeddings in place of ids, a mask of more than two dimensions, padding between tokens or,
        with a cache, behind them, and caches that do not keep all keys in order.
        """
        cache = cache_of(kwargs)
        # Before the mask, which transformers makes for its own static caches.
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(
                f"the pattern does not work with {type(cache).__name__}: use transformers' DynamicCache or one of ours."
            )
        if self.kernel and base.config._attn_implementation not in NAMES:
            raise ValueError(
                f"the model has a pattern, and its attention was set to {base.config._attn_implementation}: call "
                "remove_pattern(model) to attend fully."
            )
        ids, valid = tokens_of(kwargs)
        kwargs, history = self._history(base, kwargs)
        given = kwargs.get("attention_mask")
        if given is None and kwargs.get("position_ids") is not None:
            _one_document(kwargs["position_ids"])
        if history is None:
            plan = self.pattern.plan(ids, None if given is None else _one_block(valid))
        else:
            if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
                raise ValueError("a row of the batch has padding after its first token: pad on the left.")
            ids = history.append(ids)
            valid = torch.ones_like(ids, dtype=torch.bool)
            if given is not None:
                if given.shape != ids.shape:
                    raise ValueError(
                        f"attention_mask has {given.shape[1]} columns, and cache and call have {ids.shape[1]} tokens."
                    )
                valid = given.bool()
            plan = self.pattern.plan(ids, None if bool(valid.all()) else valid)
        new = kwargs["input_ids"].shape[1]
        if kwargs.get("position_ids") is None:
            kwargs |= position_argument(base, (valid.cumsum(1) - 1).clamp(min=0)[:, -new:])
        if self.kernel:
            kwargs["attention_mask"] = None
            kwargs["sepllm_forward"] = Forward(plan, self.pattern)
            return kwargs
        check_implementation(base)
        horizons = self.pattern.horizons
        masks = {w: visible_mask(plan, w, horizons, new) for w in dict.fromkeys(self.pattern.windows)}
        keys = torch.where(valid, valid.cumsum(1) - 1, -1)
        shown = [masks[window] for window in self.pattern.windows]
        kwargs["attention_mask"] = give_masks(base, shown, [keys] * len(shown))
        return kwargs

    def _history(self, base: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], _Ids | None]:
        """The arguments with a cache where the model would make one, and the ids that the cache holds the keys of."""
        kwargs = dict(kwargs)
        cache = cache_of(kwargs)
        if cache is None:
            used = kwargs.get("use_cache")
            mask = kwargs.get("attention_mask")
            # Nobody asked for a cache, which does not take padding behind the tokens.
            behind = mask is not None and not is_traced(mask) and not bool(mask[:, -1].all())
            default = getattr(base.config, "use_cache", False) and not base.training and not behind
            if not takes_cache(base) or not (default if used is None else used):
                kwargs["use_cache"] = False
                return kwargs, None
            cache = kwargs[cache_argument(base)] = DynamicCache(config=base.config)
        return kwargs, _Ids.of(cache, base.config.get_text_config().num_hidden_layers)


def _one_block(valid: Tensor) -> Tensor | None:
    """bool [B, N], or None where no row is known to have padding.

    Raises ValueError for padding between the tokens of a row. Where that would wait for a device, or in a compiled
    graph, it is a RuntimeError or an assertion of the device.
    """
    if not torch.is_grad_enabled() and not is_traced(valid) and bool(valid.all()):
        return None
    sentence = "a row of the batch has padding between its tokens: pad on one side."
    good = (((valid[:, 1:] & ~valid[:, :-1]).sum(1) + valid[:, 0]) <= 1).all()
    if valid.device.type != "cpu" or is_traced(valid):
        torch._assert_async(good, sentence)
    elif not bool(good):
        raise ValueError(sentence)
    return valid


def _one_document(positions: Tensor) -> None:
    """Refuse positions, i64 [B, N], that begin anew within a row: there transformers takes several documents apart.

    Raises ValueError, or as `_one_block` does what a device or a graph can.
    """
    good = (positions.diff() >= 0).all()
    sentence = "position_ids that begin anew stand for several documents in a row: give each a row of its own."
    if positions.device.type != "cpu" or is_traced(positions):
        torch._assert_async(good, sentence)
    elif not bool(good):
        raise ValueError(sentence)


class _Ids(DynamicLayer):
    """The ids of a cache's tokens, kept in it as one more layer: they follow it through beam search and crops."""

    @classmethod
    def of(cls, cache: DynamicCache, layers: int) -> _Ids:
        """That of a cache. Raises ValueError for a cache that was filled without it."""
        if len(cache.layers) > layers:
            return cache.layers[layers]
        if cache.get_seq_length() > 0:
            raise ValueError("the cache was filled without the pattern: begin with an empty one.")
        # The pattern takes the place of the model's own sliding windows too: it may show a key again.
        cache.layers[:] = [*(DynamicLayer() for _ in range(layers)), cls()]
        return cache.layers[layers]

    def append(self, ids: Tensor) -> Tensor:
        """Take ids, i64 [B, N]; gives all, [B, T]."""
        self.update(ids[:, None, :, None], ids[:, None, :, None])
        return self.keys[:, 0, :, 0].long()


def apply_pattern(
    model: Any, pattern: TokenPattern | None = None, *, implementation: str = "auto", strict: bool = False
) -> Any:
    """Let a transformers model attend by a pattern from now on, and give it back; `remove_pattern` ends it.

    pattern: that of training (of an exported model) where it is None; any other is training-free use, and an error with
    strict=True. implementation: `kernel` calls sep_attention, `mask` gives the model's own attention a mask, `auto`
    takes the first where the model allows it: a few tokens are tried out first. Batches are padded on the left;
    generation works as ever. Calls with one of our caches keep to the cache. Raises ValueError when the pattern does
    not suit the model.
    """
    base, pattern, ways = _checked(model, pattern, implementation, strict)
    config = base.config.get_text_config()
    _about_windows(base, config)
    former = _own_attention(remove_pattern(model))
    model.set_attn_implementation(former)
    trial = ModelTrial(model)
    wrong = trial.look()
    for kernel in ways if wrong is None else ():
        model.set_attn_implementation(SEP if kernel else former)
        wrong = trial.reason(partial(_window_alone, config, kernel, former), cached=True)
        if wrong is None:
            base.sepllm_pattern = PatternOnModel(pattern, kernel, former)
            return model
    model.set_attn_implementation(former)
    if implementation == "kernel":
        raise ValueError(f"implementation='kernel' does not suit {trial.name}: {wrong}. Use 'mask'.")
    raise ValueError(f"{trial.name} cannot attend by a pattern: {wrong}.")


def _checked(
    model: Any, pattern: TokenPattern | None, implementation: str, strict: bool
) -> tuple[Any, TokenPattern, tuple[bool, ...]]:
    """The attached part of a model that has the layers, the pattern, and the ways to try: True for the kernel.

    Raises ValueError when they do not fit together.
    """
    base = decoder_of(model)
    trained = trained_pattern(base.config)
    if pattern is None:
        if trained is None:
            raise ValueError(
                f"{type(base).__name__} was trained with full attention: give pattern=, made with make_pattern(...)."
            )
        pattern = trained
    elif strict and (trained is None or trained.to_dict() != pattern.to_dict()):
        raise ValueError("strict=True, and the pattern is not the one that the model was trained with.")
    config = base.config.get_text_config()
    if len(pattern.windows) != config.num_hidden_layers:
        raise ValueError(
            f"the pattern is for {len(pattern.windows)} layers and the model has {config.num_hidden_layers}."
        )
    if len(pattern.tier_of_token) > config.vocab_size:
        raise ValueError(
            f"the pattern knows {len(pattern.tier_of_token)} tokens and the model's vocabulary has "
            f"{config.vocab_size} entries: it is of another tokenizer."
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown: choose one of {', '.join(IMPLEMENTATIONS)}.")
    reason = no_kernel(base)
    if implementation == "kernel" and reason is not None:
        raise ValueError(f"implementation='kernel' does not suit {type(base).__name__}: {reason}. Use 'mask'.")
    attach(base)
    return base, pattern, {"kernel": (True,), "mask": (False,)}.get(implementation, (True, False)[reason is not None :])


def _window_alone(config: Any, kernel: bool, former: str, window: int) -> PatternOnModel:
    """A pattern of nothing but a window, for a trial."""
    pattern = TokenPattern.from_separators([], config.vocab_size, config.num_hidden_layers, window=window, initial=0)
    return PatternOnModel(pattern, kernel, former)


def _about_windows(base: Any, config: Any) -> None:
    """Warn that a pattern takes the place of a model's own windows. Raises ValueError where it cannot."""
    own = own_window(config)
    if own is None or own >= config.max_position_embeddings:
        return
    if chosen_keys(config) is not None:
        raise ValueError(
            f"{type(base).__name__} has layers that see {own} keys whatever mask they are given: a pattern cannot show "
            "them more."
        )
    warnings.warn(
        f"the pattern takes the place of the windows of {own} tokens that layers of {type(base).__name__} have.",
        stacklevel=3,
    )


def _own_attention(model: Any) -> str:
    """The attention of a model, in place of ours that of transformers."""
    base = decoder_of(model)
    used = base.config._attn_implementation
    return used if used not in NAMES else "sdpa" if getattr(base, "_supports_sdpa", True) else "eager"


def remove_pattern(model: Any) -> Any:
    """Let a model attend fully again, and give it back."""
    base = decoder_of(model)
    on = getattr(base, "sepllm_pattern", None)
    base.sepllm_pattern = None
    if on is not None:
        model.set_attn_implementation(on.former)
    return model


def load_model(path: str | Path, *, dense: bool = False, **options: Any) -> Any:
    """Load a causal model of transformers from a folder; one of ours attends by the pattern it was trained with.

    dense: full attention whatever it was trained with. options: those of AutoModelForCausalLM.from_pretrained. Raises
    UserError, a ValueError, for what is no folder of a model, which no hub is asked for, and ValueError for files that
    lack some of the weights.
    """
    check_folder(Path(path))
    options.setdefault("use_safetensors", True)
    options.setdefault("attn_implementation", "sdpa")
    options.setdefault("local_files_only", True)
    # The code beside an exported model does what this package does.
    options["trust_remote_code"] = False
    model, told = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    wrong = sorted(map(str, (*told["missing_keys"], *told["mismatched_keys"])))
    if wrong:
        raise ValueError(f"{path} lacks weights of its model, or has them in another shape: {', '.join(wrong[:3])}.")
    model.eval()
    if trained_pattern(model.config) is not None and not dense:
        apply_pattern(model)
    return model


def check_folder(folder: Path) -> None:
    """Raise UserError with what to do for what is no folder of a transformers model."""
    if os.path.isfile(folder / "config.json"):
        return
    if os.path.isfile(folder / "config.yaml"):
        raise UserError(f"{folder} is a run, not a model of transformers: `sepllm export {folder} FOLDER` writes one.")
    if os.path.isfile(folder / "adapter_config.json"):
        raise UserError(f"{folder} is an adapter without its model: load the model, then put the adapter on it.")
    if os.path.isdir(folder):
        raise UserError(f"{folder} has no config.json: give the folder of a transformers model.")
    if os.path.exists(folder):
        raise UserError(f"{folder} is a file: give the folder of a transformers model, with its config.json.")
    raise UserError(
        f"{folder} is not a folder: give that of an exported model, or download a model of a hub first "
        "(`hf download NAME --local-dir FOLDER`)."
    )


def no_kernel(base: Any) -> str | None:
    """Reason why sep_attention cannot be the model's attention; None when it can."""
    config = base.config.get_text_config()
    if not getattr(base, "_supports_attention_backend", False):
        return "it does not let its attention be chosen"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it caps the logits of its attention"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    return f"it has layers of {', '.join(sorted(kinds))}" if kinds else None


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sepllm_forward: Forward | None = None,
    sepllm_decode: DecodeCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention under the names `sep` and `sepllm`: query [B, H, N, D], key and value [B, G, T, D]; gives [B, N, H, D].

    Raises ValueError when the forward brings neither the pattern nor a mask: nothing attends fully in silence.
    """
    if sepllm_decode is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = attend(sepllm_decode, module.layer_idx, query[:, :, 0], scale)
        return out[:, None], None
    if sepllm_forward is None:
        if attention_mask is None:
            raise ValueError(
                "the model is to attend by a separator pattern and was not given one: load it with "
                "sepllm_train.hf.load_model(folder), call sepllm_train.hf.apply_pattern(model, pattern), or make it of "
                "a config that has config.sepllm_attention = pattern.to_dict()."
            )
        kwargs.pop("sliding_window", None)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("s_aux") is not None or dropout:
        raise ValueError(
            "attention sinks of the model's own and dropout do not go with implementation='kernel': use 'mask', or set "
            "the dropout of the model's attention to 0."
        )
    if kwargs.get("softcap") is not None:
        raise ValueError("the model caps the logits of its attention, which implementation='kernel' does not.")
    window = sepllm_forward.pattern.windows[module.layer_idx]
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave queries and keys in full precision.
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    out = sep_attention(
        query,
        key,
        value,
        sepllm_forward.plan,
        window=window,
        horizons=sepllm_forward.pattern.horizons,
        scale=scaling,
    )
    if not torch.compiler.is_compiling():
        sepllm_forward.layers_run.add(module.layer_idx)
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    """The mask of our attention: none, the plan tells what is seen."""


def _apply_own_pattern(parent: Any, name: str, module: Any) -> None:
    """Let a model whose config asks for our attention and has a pattern attend by it, once it is part of another.

    torch calls this for every module that becomes part of a module, so for the model inside of each `...ForCausalLM`.
    """
    if not isinstance(module, PreTrainedModel) or module.config._attn_implementation not in NAMES:
        return
    on = getattr(module.base_model, "sepllm_pattern", None)
    if on is None and getattr(module.config, CONFIG_KEY, None) is not None:
        # from_pretrained makes tensors without memory here.
        with torch.device("cpu"):
            base, pattern, _ = _checked(module, None, "kernel", strict=False)
        # Nothing is tried out: the weights are still to come.
        base.sepllm_pattern = PatternOnModel(pattern, True, _own_attention(module))


for _name in NAMES:
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _no_mask)
register_module_module_registration_hook(_apply_own_pattern)

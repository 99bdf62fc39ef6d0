"""A separator pattern on a transformers model: every forward attends by it, prompts and generation alike.

Shape letters: B rows (sequences), T tokens of which the last N are new, H heads, D features.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sep_attention import AttentionPlan, DecodeCache, attend, sep_attention, visible_mask
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from sepllm_train.base.errors import UserError
from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.hf.guard import ATTENTION
from sepllm_train.hf.hooks import attach, cache_argument, cache_of, check_implementation, give_masks, tokens_of
from sepllm_train.hf.separators import trained_pattern

IMPLEMENTATIONS = ("auto", "kernel", "mask")


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

        Raises ValueError for embeddings in place of ids, a mask of more than two dimensions, padding on the right, and
        caches that do not keep all keys in order.
        """
        cache = cache_of(kwargs)
        # Before the mask, which transformers makes for its own static caches.
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(
                f"the pattern does not work with {type(cache).__name__}: use transformers' DynamicCache or one of ours."
            )
        ids, valid = tokens_of(kwargs)
        if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
            raise ValueError("a row of the batch has padding after its first token: pad on the left.")
        kwargs, history = self._history(base, kwargs)
        given = kwargs.get("attention_mask")
        if history is not None:
            ids = history.append(ids)
            valid = torch.ones_like(ids, dtype=torch.bool)
            if given is not None and given.shape == ids.shape:
                valid = given.bool()
        new = kwargs["input_ids"].shape[1]
        plan = self.pattern.plan(ids, None if bool(valid.all()) else valid)
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = (valid.cumsum(1) - 1).clamp(min=0)[:, -new:]
        if self.kernel:
            kwargs["attention_mask"] = None
            kwargs["sepllm_forward"] = Forward(plan, self.pattern)
            return kwargs
        check_implementation(base)
        horizons = self.pattern.horizons
        masks = {w: visible_mask(plan, w, horizons, new) for w in dict.fromkeys(self.pattern.windows)}
        kwargs["attention_mask"] = give_masks(base, [masks[window] for window in self.pattern.windows])
        return kwargs

    def _history(self, base: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], _Ids | None]:
        """The arguments with a cache where the model would make one, and the ids that the cache holds the keys of."""
        kwargs = dict(kwargs)
        cache = cache_of(kwargs)
        if cache is None:
            used = kwargs.get("use_cache")
            if not (base.config.use_cache if used is None else used):
                return kwargs, None
            cache = kwargs[cache_argument(base)] = DynamicCache(config=base.config)
        return kwargs, _Ids.of(cache, base.config.get_text_config().num_hidden_layers)


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
    takes the first where the model allows it. Batches are padded on the left; generation works as ever. Calls with one
    of our caches keep to the cache. Raises ValueError when the pattern does not suit the model.
    """
    base = model.base_model
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
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        raise ValueError(f"{type(base).__name__} has ALiBi positions, which a pattern of keys does not suit.")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown: choose one of {', '.join(IMPLEMENTATIONS)}.")
    reason = no_kernel(base)
    if implementation == "kernel" and reason is not None:
        raise ValueError(f"implementation='kernel' does not suit {type(base).__name__}: {reason}. Use 'mask'.")
    attach(base)
    former = _own_attention(remove_pattern(model))
    if implementation != "mask" and reason is None:
        model.set_attn_implementation(ATTENTION)
        base.sepllm_pattern = PatternOnModel(pattern, True, former)
        if implementation == "kernel" or _runs(base):
            return model
    model.set_attn_implementation(former)
    base.sepllm_pattern = PatternOnModel(pattern, False, former)
    return model


def _own_attention(model: Any) -> str:
    """The attention of a model, in place of ours that of transformers."""
    base = model.base_model
    used = base.config._attn_implementation
    return used if used != ATTENTION else "sdpa" if getattr(base, "_supports_sdpa", True) else "eager"


@torch.no_grad()
def _runs(base: Any) -> bool:
    """True when a forward of two tokens works: some models have attention that ours does not, and report it in no other
    way."""
    training = base.training
    try:
        base.eval()
        base(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=base.device), use_cache=False)
    except (ValueError, TypeError, RuntimeError, AttributeError):
        return False
    finally:
        base.train(training)
    return True


def remove_pattern(model: Any) -> Any:
    """Let a model attend fully again, and give it back."""
    base = model.base_model
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
    """Attention under the name `sepllm`: query [B, H, N, D], key and value [B, G, T, D]; gives [B, N, H, D].

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
                "sepllm_train.hf.load_model(folder), or call sepllm_train.hf.apply_pattern(model)."
            )
        kwargs.pop("sliding_window", None)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("s_aux") is not None or dropout:
        raise ValueError("attention sinks of the model's own and dropout do not go with implementation='kernel'.")
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
    sepllm_forward.layers_run.add(module.layer_idx)
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    """The mask of `sepllm`: none, the plan tells what is seen."""


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)

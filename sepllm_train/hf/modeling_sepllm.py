"""A causal model that attends by the separator pattern it was trained with, on torch and transformers alone.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

sepllm-train writes this file into the models that it exports. `sepllm_attention` in config.json is the pattern: key j
is visible to query i iff both are in the same document and `0 <= i - j < max(window of the layer, reach of j)`. The
reach of a separator is the horizon of its tier; that of the first tokens of a document is without end; that of any
other token is 0. Here the pattern is a mask for scaled_dot_product_attention. Where the package sepllm_train is
installed, its kernels and its cache take the place of what is below.

Shape letters: B rows of the batch, padded on the left; N new tokens; W keys in the cache; T = W + N.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
import transformers
from torch import Tensor

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 5):
    raise ImportError(f"it needs transformers 5.5 or newer and {transformers.__version__} is installed: upgrade it.")

from transformers import AttentionInterface, GPTNeoXForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

package: Any = None
with suppress(ImportError):
    package = import_module("sepllm_train.hf")

FOREVER = 1 << 40
# Keys that a cache may hold beyond those that are still visible: dropping costs a copy of what stays.
SLACK = 128
# Attention that transformers alone does not have, so that it refuses to load the model; and the one below.
GUARD, MASKED = "sepllm", "sepllm_masked"
# Names of a forward's cache, since transformers 5.24 and before.
CACHE_NAMES = ("cache", "past_key_values")


class Pattern:
    """`sepllm_attention` of a model's config.json. Raises ValueError when there is none or it is of another model.

    Attributes: windows, of each layer, the token itself included; initial, tokens at the start of a document that are
    visible without end; reach, i64 [vocabulary], of separators, 0 for ordinary tokens; interval, every interval-th
    token is a separator in place of those; end, id of the token that ends a document, -1 where they see each other.
    """

    def __init__(self, config: Any) -> None:
        content = getattr(config, "sepllm_attention", None)
        if content is None:
            raise ValueError("config.json has no sepllm_attention: load the model without trust_remote_code.")
        if content["format"] != 1 or len(content["windows"]) != config.num_hidden_layers:
            raise ValueError("sepllm_attention in config.json is not of this model and module: export it again.")
        self.windows = [FOREVER if window is None else window for window in content["windows"]]
        self.initial, self.interval = content["initial_tokens"], content["interval"]
        self.end = -1 if content["end_of_document"] is None else content["end_of_document"]
        self.reach = torch.zeros(config.vocab_size, dtype=torch.int64, device="cpu")
        for tier in content["tiers"]:
            horizon = FOREVER if tier["horizon"] is None else tier["horizon"]
            self.reach[torch.tensor(tier["tokens"], dtype=torch.int64, device="cpu")] = horizon

    def reach_of(self, ids: Tensor, position: Tensor, start: Tensor) -> Tensor:
        """i64 [B, N]: reach of tokens; position: i64 [B, N] in the row; start: where each token's document began."""
        self.reach = self.reach.to(ids.device)
        known = self.reach[ids.clamp(max=len(self.reach) - 1)] * (ids < len(self.reach))
        reach = torch.where(position % self.interval == 0, FOREVER, 0) if self.interval else known
        return torch.where(position - start < self.initial, FOREVER, reach)


class BoundedCache(Cache):
    """Keys and values that a pattern will show again; keys keep the position at which they came.

    Layers with the same window share the description of their keys: `held[window]`, i64 [3, B, W], has the position of
    each in its row, its reach, and where its document began (-1, 0 and -1 for padding).

    Attributes: columns, tokens seen with padding; seen: i64 [B], those of each row; start: i64 [B], position at which
    the document of each row's next token began.
    """

    def __init__(self, pattern: Pattern) -> None:
        super().__init__(layers=[DynamicLayer() for _ in pattern.windows])
        self.pattern, self.recording, self.columns = pattern, False, 0
        self.held: dict[int, Tensor] = {}
        self.seen = self.start = torch.zeros(0, dtype=torch.int64)
        self.limit = dict.fromkeys(self.pattern.windows, SLACK)

    def append(self, ids: Tensor, valid: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Take N tokens, i64 and bool [B, N]. Returns their positions, i64 [B, N], and for each layer the mask of what
        they see, bool [B, 1, N, T].

        Raises ValueError for padding after a row's first token, and for a batch of another size than before.
        """
        if not self.columns:
            self.seen = self.start = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
        if len(ids) != len(self.seen):
            raise ValueError(f"the cache holds {len(self.seen)} rows and was given {len(ids)}.")
        before = torch.cat(((self.seen > 0)[:, None], valid[:, :-1]), 1)
        if bool((before & ~valid).any()):
            raise ValueError("a row of the batch has padding after its first token: pad on the left.")
        position = self.seen[:, None] + valid.cumsum(1) - 1
        begins = torch.where(valid & (ids == self.pattern.end), position + 1, 0)
        start = torch.cat((self.start[:, None], begins), 1).cummax(1).values
        self.seen, self.start, start = self.seen + valid.sum(1), start[:, -1], start[:, :-1]
        new = _only(valid, torch.stack((position, self.pattern.reach_of(ids, position, start), start)))
        masks = {}
        for window in dict.fromkeys(self.pattern.windows):
            held = torch.cat((self.held[window], new), 2) if window in self.held else new
            self.held[window] = held
            distance = new[0, :, :, None] - held[0, :, None]
            visible = (distance >= 0) & (distance < held[1, :, None].clamp(min=window))
            # Padding sees padding: a softmax over nothing would be NaN.
            masks[window] = (visible & (new[2, :, :, None] == held[2, :, None]))[:, None]
        self.columns += ids.shape[1]
        return position.clamp(min=0), [masks[window] for window in self.pattern.windows]

    def drop(self) -> None:
        """Drop the keys that no later token sees, once there are SLACK of them or more tokens have come."""
        for window, held in self.held.items():
            width = held.shape[2]
            if width < self.limit[window]:
                continue
            keep = (self.seen[:, None] - held[0] < held[1].clamp(min=window)) & (held[2] == self.start[:, None])
            most = int(keep.sum(1).max())
            self.limit[window] = most + SLACK
            if most == width:
                continue
            # Stable: what goes comes first, what stays keeps its order.
            order = keep.argsort(dim=1, stable=True)[:, width - most :]
            self.held[window] = _only(keep.gather(1, order), held.gather(2, order.expand(3, -1, -1)))
            for layer, own in zip(self.layers, self.pattern.windows, strict=True):
                if own == window:
                    layer.keys, layer.values = _columns(layer.keys, order), _columns(layer.values, order)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included: generate cuts the prompt by it."""
        return self.columns

    def reset(self) -> None:
        """Forget all tokens."""
        BoundedCache.__init__(self, self.pattern)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take row beam_idx[i] for row i, i64 [B]: beam search."""
        super().reorder_cache(beam_idx)
        beam_idx = beam_idx.to(self.seen.device)
        self.seen, self.start = self.seen[beam_idx], self.start[beam_idx]
        self.held = {window: held[:, beam_idx] for window, held in self.held.items()}

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Take each row `repeats` times."""
        self.reorder_cache(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Drop keys in `crop` alone from now on; assisted decoding calls this."""
        self.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove columns; a number above 0 is the count of columns that stay.

        Raises RuntimeError where keys are dropped: call `activate_past_recording` first.
        """
        gone = self.columns - int(tokens_to_remove) if tokens_to_remove > 0 else -int(tokens_to_remove)
        if gone and not self.recording:
            raise RuntimeError("the cache drops keys and cannot go back: call activate_past_recording() first.")
        if gone:
            for layer in self.layers:
                layer.crop(-gone)
            self.seen, _, self.start = next(iter(self.held.values()))[:, :, -gone].clamp(min=0)
            self.held = {window: held[:, :, :-gone] for window, held in self.held.items()}
            self.columns -= gone
        self.drop()


def _only(keep: Tensor, held: Tensor) -> Tensor:
    """Descriptions i64 [3, B, W] with padding where `keep`, bool [B, W], is False."""
    padding = torch.tensor([-1, 0, -1], device=held.device)[:, None, None]
    return torch.where(keep, held, padding)


def _columns(held: Tensor, order: Tensor) -> Tensor:
    """Columns `order`, i64 [B, W], of keys or values [B, G, *, D]."""
    return held.gather(2, order[:, None, :, None].to(held.device).expand(-1, held.shape[1], -1, held.shape[3]))


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sepllm_masks: list[Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer by its mask. Raises ValueError without one: nothing attends fully in silence."""
    if sepllm_masks is None:
        raise ValueError("the model attends by a separator pattern and was called in a way that does not bring it.")
    return sdpa_attention_forward(module, query, key, value, sepllm_masks[module.layer_idx], **kwargs)


AttentionInterface.register(MASKED, attend)


def _before(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """Hook before the forward of the model without its head: its arguments with the masks of the pattern.

    Raises ValueError for what a pattern by token ids does not suit.
    """
    kwargs = {**dict(zip(inspect.signature(base.forward).parameters, args, strict=False)), **kwargs}
    if base.config._attn_implementation != MASKED:
        raise ValueError("the model's attention was changed to another, which does not know its separator pattern.")
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if ids is None:
        raise ValueError("the call has no input_ids: separators are found by the tokens' ids, not by embeddings.")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError("attention_mask must have two dimensions: the pattern makes its own mask.")
    given = kwargs.get("position_ids")
    if given is not None and mask is None and bool((given.diff() < 0).any()):
        raise ValueError("position_ids that begin anew stand for several documents in a row: give each a row.")
    name, cache = cache_name(base), next((kwargs.pop(n) for n in CACHE_NAMES if kwargs.get(n) is not None), None)
    if cache is not None and not isinstance(cache, BoundedCache):
        raise ValueError(f"a {type(cache).__name__} does not suit the pattern: leave it out, and the model makes one.")
    used = base.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
    if cache is None and used and not (base.training and base.is_gradient_checkpointing):
        cache = BoundedCache(base.sepllm_pattern)
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[1] :].bool()
    # Without a cache of the call's own, one that is thrown away makes the masks.
    position, masks = (BoundedCache(base.sepllm_pattern) if cache is None else cache).append(ids, valid)
    kwargs["position_ids"] = position if given is None else given
    return (), {**kwargs, name: cache, "attention_mask": None, "sepllm_masks": masks}


def _after(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = kwargs[cache_name(base)]
    if cache is not None and not cache.recording:
        cache.drop()


def cache_name(model: Any) -> str:
    """The name under which a model's forward takes its cache."""
    return next(name for name in CACHE_NAMES if name in inspect.signature(model.forward).parameters)


class PatternMixin:
    """A class of transformers that attends by its pattern; the kernels of sepllm_train take over where they are."""

    # save_pretrained writes this file along.
    _auto_class = "AutoModelForCausalLM"
    kernels = package is not None

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        config._attn_implementation = GUARD if self.kernels else MASKED
        # transformers forgets the name when it saves a model, but not this attribute.
        config.attn_implementation = GUARD
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if self.kernels:
            return  # The package has put the pattern on every model of this attention.
        self.base_model.sepllm_pattern = Pattern(config)
        self.base_model.register_forward_pre_hook(_before, with_kwargs=True)
        self.base_model.register_forward_hook(_after, with_kwargs=True)

    @classmethod
    def from_pretrained(cls: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a model as transformers does. Raises ValueError for files that lack weights, which would be random."""
        if issubclass(cls, GPTNeoXForCausalLM):
            # transformers knows the other name of its head in classes of its own alone.
            names = ("embed_out", "lm_head")
            old, new = names if "lm_head.weight" in cls._tied_weights_keys else names[::-1]
            kwargs.setdefault("key_mapping", {rf"^{old}\.": f"{new}."})
        model, told = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        if told["missing_keys"]:
            raise ValueError(f"the files lack weights of the model: {', '.join(sorted(told['missing_keys'])[:3])}.")
        return (model, told) if output_loading_info else model

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, with a cache that drops the keys which the pattern will not show again."""
        used = kwargs.get("use_cache", (kwargs.get("generation_config") or self.generation_config).use_cache)
        if used is not False and all(kwargs.get(name) is None for name in CACHE_NAMES):
            cache = package.PatternCache(self) if self.kernels else BoundedCache(self.base_model.sepllm_pattern)
            kwargs[cache_name(self)] = cache
        return super().generate(*args, **kwargs)  # type: ignore[misc]


class SepGPTNeoXForCausalLM(PatternMixin, GPTNeoXForCausalLM):
    """GPT-NeoX with separator attention."""


class SepLlamaForCausalLM(PatternMixin, LlamaForCausalLM):
    """Llama with separator attention."""


class SepQwen3ForCausalLM(PatternMixin, Qwen3ForCausalLM):
    """Qwen3 with separator attention."""

"""Decoding with the separator cache in tensors that never change their shape: for torch.compile and CUDA graphs.

Shape letters: B rows (sequences), C slots, G key heads, D features, V vocabulary entries.
"""

from __future__ import annotations

from typing import Any

import torch
from sep_attention import FOREVER, DecodeCache, advance
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sepllm_train.base.errors import UserError
from sepllm_train.generation.cache import check_context
from sepllm_train.hf.caches import SepCache
from sepllm_train.hf.guard import ATTENTION
from sepllm_train.hf.hooks import cache_argument, decoder_of
from sepllm_train.hf.masks import additive
from sepllm_train.hf.pattern import no_kernel
from sepllm_train.hf.rotary import Rotation

MODES = ("eager", "compile", "graph")


class StaticLayer(CacheLayerMixin):
    """Slots [B, G, C, D] of one layer."""

    # True would make generate compile the model with our hooks in it.
    is_compileable = False
    is_sliding = False

    def __init__(self, cache: StaticSepCache, number: int) -> None:
        super().__init__()
        self._cache = cache
        self._number = number
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the tensors are there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put keys and values [B, G, 1, D] in the slots that `advance` made; returns the slots in use, [B, G, W, D]."""
        held, number = self._cache.slots, self._number
        place = self._cache.place.expand_as(key_states)
        keys, values = held.keys[number], held.values[number]
        keys.scatter_(2, place, key_states)
        values.scatter_(2, place, value_states)
        if held.arrived is not None:
            held.arrived[number].scatter_(2, place, key_states)
        width = self._cache.width
        return keys[:, :, :width], values[:, :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots in use."""
        return self._cache.width, 0

    def get_seq_length(self) -> int:
        """Slots: how many are filled is known on the device only."""
        return self._cache.slots.capacity

    def get_max_length(self) -> int:
        """The slots."""
        return self._cache.slots.capacity

    get_max_cache_shape = get_max_length


class StaticSepCache(Cache):
    """Contents of a SepCache in slots from the left: the state of a `Decoder`."""

    # The hooks of our other caches pass over this one: a `Decoder` gives the model everything itself.
    sepllm_static = True

    def __init__(self, slots: DecodeCache) -> None:
        self.slots = slots
        # W, the slots that are attended to: all, or only the filled ones, where their number is known without waiting.
        self.width = slots.capacity
        # The new token's slot, [B, 1, 1, 1].
        self.place = torch.zeros(len(slots.length), 1, 1, 1, dtype=torch.int64, device=slots.keys.device)
        super().__init__(layers=[StaticLayer(self, number) for number in range(len(slots.keys))])

    @property
    def lengths(self) -> list[int]:
        """Keys of each row now."""
        return self.slots.length.tolist()


class Decoder:
    """Generates token by token behind a prompt that a SepCache has taken; no tensor is made anew from step to step.

    decoder = Decoder(model, cache)            # cache: a SepCache that has seen the prompt
    logits = decoder.step(ids)                 # ids: i64 [B], the token that was chosen for each row

    mode: `eager`; `compile` compiles the forward, once, on a GPU; `graph` captures bookkeeping and forward in a CUDA
    graph. kernel: attend with our decoding kernel; None does so where the device is a GPU and the model lets its
    attention be chosen. Raises ValueError when cache or model do not suit, UserError for a mode that the device does
    not have.
    """

    def __init__(self, model: Any, cache: SepCache, *, mode: str = "eager", kernel: bool | None = None) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is unknown: choose one of {', '.join(MODES)}.")
        _check(model, cache)
        self.model = model
        self.cache = StaticSepCache(_filled(model, cache))
        device = self.cache.slots.keys.device
        base = decoder_of(model)
        reason = no_kernel(base)
        if kernel and reason is not None:
            raise ValueError(f"kernel=True does not suit {type(base).__name__}: {reason}.")
        if mode == "graph" and device.type != "cuda":
            raise UserError(f"mode='graph' needs a CUDA device, the cache is on {device.type}.")
        if mode == "compile" and device.type == "cpu":
            raise UserError("mode='compile' is slower than mode='eager' on a CPU: use mode='eager' there.")
        self.kernel = reason is None and device.type == "cuda" if kernel is None else kernel
        # On a CPU filled slots are counted without waiting, and fewer of them are less work.
        self._narrow = mode == "eager" and device.type == "cpu" and not self.kernel
        self._moves = cache.moves
        self._seen, self._end = int(cache.tokens.max()), cache.context if cache.positions == "training" else None
        self._reach = cache.pattern.reach_of_token().to(device)
        self._ids = torch.zeros(len(cache.lengths), 1, dtype=torch.int64, device=device)
        self._forward = torch.compile(model.forward, fullgraph=True, dynamic=False) if mode == "compile" else model
        self._argument = cache_argument(model)
        self._mode = mode
        self._graph: Any = None
        self._logits: Tensor | None = None

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Take one token of each row, i64 [B]; gives the logits of the next, [B, V] (in `graph` mode always the same
        tensor)."""
        if ids.shape != self._ids.shape[:1]:
            raise ValueError(f"step takes one token for each of {len(self._ids)} rows, got {list(ids.shape)}.")
        self._seen += 1
        check_context(self._seen, self._end)
        self._ids.copy_(ids[:, None])
        if self._mode != "graph":
            return self._step()
        if self._graph is None:
            self._capture()
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _step(self) -> Tensor:
        held = self.cache.slots
        advance(held, self._ids[:, 0], self._reach)
        self.cache.place.copy_((held.length - 1)[:, None, None, None])
        positions = (held.length if self._moves else held.seen) - 1
        arguments: dict[str, Any] = {
            "input_ids": self._ids,
            "position_ids": positions.long()[:, None],
            self._argument: self.cache,
            "use_cache": True,
        }
        if not self.kernel:
            if self._narrow:
                self.cache.width = int(held.length.max())
            filled = torch.arange(self.cache.width, device=held.keys.device) < held.length[:, None]
            arguments["attention_mask"] = additive(filled[:, None], held.keys.dtype)
            return self._forward(**arguments).logits[:, -1]
        config = decoder_of(self.model).config
        before = config._attn_implementation
        try:
            config._attn_implementation = ATTENTION
            return self._forward(**arguments, attention_mask=None, sepllm_decode=held).logits[:, -1]
        finally:
            config._attn_implementation = before

    def _capture(self) -> None:
        """Record a step, after one that compiles the kernels; the cache is put back to where it was."""
        held = self.cache.slots
        names = ("length", "seen", "reach", "position", "arrival", "keys", "values", "arrived")
        before = {name: getattr(held, name).clone() for name in names if getattr(held, name) is not None}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._step()
        for name, tensor in before.items():
            getattr(held, name).copy_(tensor)


def _check(model: Any, cache: SepCache) -> None:
    """Raise ValueError when a cache cannot go on in slots of a fixed number."""
    if not isinstance(cache, SepCache) or len(cache.policies) > 1:
        raise ValueError("a Decoder goes on with a SepCache whose layers all keep the same keys.")
    if not cache.held or not min(cache.lengths):
        raise ValueError("the cache is empty: let the model take the prompt first.")
    if decoder_of(model).sepllm_layer_masks.biases is not None:
        raise ValueError("a Decoder knows no ALiBi biases: generate with the cache itself.")


def _filled(model: Any, cache: SepCache) -> DecodeCache:
    """Slots with what `cache` holds."""
    policy, first = cache.policies[0], cache.layers[0].tensors()["keys"]
    assert policy.capacity is not None and policy.separators is not None
    rows, kv_heads, _, features = first.shape
    frequencies = None
    if cache.moves:
        assert isinstance(cache.rotation, Rotation)
        frequencies = cache.rotation.frequencies(features)
    held = DecodeCache.allocate(
        len(cache.layers),
        rows,
        model.config.get_text_config().num_attention_heads,
        kv_heads,
        policy.capacity,
        features,
        initial=policy.initial,
        separators=policy.separators,
        window=policy.window,
        dtype=first.dtype,
        device=first.device,
        inverse_frequencies=frequencies,
    )
    slots = cache.held[0].slots
    held.length.copy_(slots.length)
    held.seen.copy_(slots.seen)
    for row, length in enumerate(cache.lengths):
        own = slice(slots.width - length, slots.width)
        held.reach[row, :length] = slots.reach[row, own].clamp(max=FOREVER).int()
        held.position[row, :length] = slots.position[row, own]
        place = torch.arange(length, device=first.device)
        held.arrival[row, :length] = (place - cache.offset[row, own] if cache.moves else place).int()
        for number, layer in enumerate(cache.layers):
            for name, tensor in layer.tensors().items():
                getattr(held, name)[number, row, :, :length] = tensor[row, :, own]
    return held

"""The separator cache behind the interface of transformers' caches, for unpatched models.

Shape letters: B rows (sequences), W columns (keys, padding on the left), N new tokens, G key heads, D features.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from sep_attention import FOREVER
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sepllm_train.generation.cache import Held, KeyBuffers, Move, check_positions
from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.generation.slots import CachePolicy
from sepllm_train.hf.hooks import TokenCache, attach, base_of, own_window
from sepllm_train.hf.probe import check_cache
from sepllm_train.hf.rotary import Rotation

# States that assisted decoding can go back to; between two of them at least a token comes.
UNDO = 64
POSITIONS = ("cache", "training", "absolute")


class SlotLayer(KeyBuffers, CacheLayerMixin):
    """Keys and values of one layer as transformers handles them.

    cache: the SlotCache of the layer, which knows the tokens that come. capacity: as in KeyBuffers.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, cache: Any, capacity: int | None) -> None:
        CacheLayerMixin.__init__(self)
        KeyBuffers.__init__(self, capacity)
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note type and device; `append` makes the buffers."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, G, N, D]; returns all of them, [B, G, W, D].

        Raises RuntimeError when the model's hooks have not announced these tokens to the cache.
        """
        if self._cache.pending != key_states.shape[-2]:
            raise RuntimeError(
                "the cache was not told which tokens these keys are of: it was made for another model than it is given "
                "to, or that model's hooks were removed."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.append(key_states, value_states, key_states if self._cache.moves else None)

    def restore(self, state: tuple[Any, ...]) -> None:
        """Go back to an older state."""
        super().restore(state)
        if self.keys is None or self.values is None:
            self.is_initialized = False
        else:
            self.lazy_initialization(self.keys, self.values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that `query_length` new tokens see, and the number of the first."""
        return self.width + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: generate cuts the prompt by it."""
        return self._cache.columns_seen

    def get_max_length(self) -> int:
        """No maximum: keys make room by themselves."""
        return -1

    # Its name before transformers 5.15.
    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Layers are cropped together, by the cache."""
        raise RuntimeError("crop the cache, not one of its layers.")


class SlotCache(TokenCache):
    """A cache whose layers keep what their policies say.

    model: a transformers model, or the config of one that `attach` was called on. policies: one per layer. pattern:
    tells the separators among the tokens. positions: `cache`, where a key's position is its place in the cache, for
    texts of any length; `training`, where every key keeps its position in the text, up to the model's context length;
    or `absolute`, the same beyond that length, where a model fails: for comparison. block: most tokens of a forward at
    once; longer prompts are cut, which changes no result.

    A prompt is compressed as it comes: each token sees what it would have seen had the tokens come one by one. Batches
    are padded on the left. A further call continues the text; `reset` empties the cache.

    Attributes: columns_seen, tokens seen, padding included. Raises ValueError for what does not fit the model.
    """

    # Where the cache is not what the model was trained with, in words.
    differences: tuple[str, ...] = ()
    layers: list[SlotLayer]
    _recording: bool
    # Older states to go back to.
    _log: list[tuple[Any, ...]]

    def __init__(
        self, model: Any, policies: Sequence[CachePolicy], pattern: TokenPattern, *, positions: str, block: int = 1024
    ) -> None:
        base = base_of(model)
        self.base = weakref.ref(base)
        context = _context(base.config.get_text_config())
        TokenCache.__init__(self, policies, pattern, positions=positions, block=block, context=context)
        _check(base, self.policies, positions, context)
        attach(base)
        Cache.__init__(self, layers=[SlotLayer(self, policy.capacity) for policy in policies])
        check_cache(base, _trial_cache)
        self.rotation = Rotation(base) if self.moves else None

    @property
    def lengths(self) -> list[int]:
        """Keys of each row in the first layer now."""
        return self.held[self.group_of_layer[0]].slots.length.tolist() if self.held else []

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(layer.nbytes for layer in self.layers)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Column of the next token."""
        return self.layers[layer_idx].width

    def reset(self) -> None:
        """Forget all tokens."""
        for layer in self.layers:
            layer.reset()
        self._forget_all()

    def activate_past_recording(self) -> None:
        """From now on keep what `crop` needs to go back behind dropped keys; assisted decoding calls this."""
        self._recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove columns, as if they had not come.

        A number above 0 is the count of columns that stay, as older versions of transformers give it. Raises
        ValueError for more columns than there were, RuntimeError when keys were dropped since, without
        `activate_past_recording`.
        """
        # transformers before 5.18 gives a tensor, which += would change.
        tokens_to_remove = int(tokens_to_remove)
        target = tokens_to_remove if tokens_to_remove > 0 else self.columns_seen + tokens_to_remove
        if not 0 <= target <= self.columns_seen:
            raise ValueError(f"crop({tokens_to_remove}): the cache has seen {self.columns_seen} tokens only.")
        # The newest state from which only columns are to be taken back.
        states = [self._state(), *reversed(self._log)]
        back = next((n for n, state in enumerate(states) if all(target >= held.dropped_at for held in state[1])), None)
        if back is None:
            raise RuntimeError(
                f"the cache cannot go back by {self.columns_seen - target} tokens: it has dropped keys since. Call "
                "activate_past_recording() before those tokens come."
            )
        self._restore(states[back])
        self._log = self._log[: len(self._log) - back]
        self._take_back(self.columns_seen - target)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take row beam_idx[i] for row i, i64 [B']: beam search."""
        if self.held:
            self.select(beam_idx)
            self._log = []

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows numbered `indices`, i64 [B']."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.reorder_cache(torch.arange(len(self.offset)).repeat_interleave(repeats))

    def _forget_all(self) -> None:
        super()._forget_all()
        self.pending = -1
        self.running = False
        self.pieces = []
        self._recording = False
        self._log = []

    def _move_to(self, place: Tensor) -> Move:
        assert self.rotation is not None
        return partial(self.rotation, distance=self.offset)

    def _before_dropping(self) -> None:
        if self._recording:
            self._log = [*self._log[1 - UNDO :], self._state()]

    def _take_back(self, columns: int) -> None:
        if not columns:
            return
        for group, held in enumerate(self.held):
            slots = held.slots.without_last(columns)
            count = (held.slots.position[:, -columns:] >= 0).long()
            lengths = (count * (slots.length[:, None] + count.cumsum(1))).sum(1)
            self.held[group] = Held(slots, held.length_sum - lengths, held.dropped_at, held.room)
        self.tokens = self.tokens - count.sum(1)
        self.ended = torch.zeros_like(self.ended)
        if self.moves:
            self.offset = self.offset[:, :-columns]
        for layer in self.layers:
            layer.take_back(columns)
        self.columns_seen -= columns

    def _state(self) -> tuple[Any, ...]:
        layers = [layer.state() for layer in self.layers]
        return self.columns_seen, list(self.held), self.offset, layers, self.tokens, self.ended

    def _restore(self, state: tuple[Any, ...]) -> None:
        self.columns_seen, self.held, self.offset, layers, self.tokens, self.ended = state
        for layer, held in zip(self.layers, layers, strict=True):
            layer.restore(held)


def _trial_cache(base: Any, window: int, initial: int) -> SlotCache:
    """A cache of the first `initial` tokens and the last `window`, for trying a model out."""
    layers = base.config.get_text_config().num_hidden_layers
    pattern = TokenPattern.from_separators(
        [], base.config.get_text_config().vocab_size, layers, window=window, initial=initial
    )
    policy = CachePolicy(window, initial, 0, initial + window)
    return SlotCache(base, [policy] * layers, pattern, positions="training")


def _context(config: Any) -> int | None:
    """Positions up to which the model's rotary embedding is what it was trained with."""
    rope = getattr(config, "rope_parameters", None) or {}
    known = (getattr(config, "max_position_embeddings", None), rope.get("original_max_position_embeddings"))
    limits = [limit for limit in known if limit and limit > 0]
    scaled = rope.get("rope_type", "default") in ("llama3", "yarn", "linear")
    return (max if scaled else min)(limits) if limits else None


def _most_keys(policy: CachePolicy, context: int | None) -> int:
    """Keys that are to be seen as the model itself sees them; a pattern as a mask takes the place of its windows."""
    if policy.capacity is not None:
        return policy.capacity
    return (context or FOREVER) if policy.window >= FOREVER else 0


def _check(base: Any, policies: Sequence[CachePolicy], positions: str, context: int | None) -> None:
    """Raise ValueError when the policies do not suit the model or the positions."""
    config = base.config.get_text_config()
    capacity = max(_most_keys(policy, context) for policy in policies)
    sliding = own_window(config)
    if sliding is not None and capacity > sliding:
        raise ValueError(
            f"the cache may hold {capacity} keys, more than the model's own sliding window of {sliding}: give a "
            "capacity of at most that, the same in all layers."
        )
    check_positions(positions, policies, POSITIONS)
    if positions == "cache" and context is not None and capacity > context:
        raise ValueError(f"capacity={capacity} is above the model's context of {context} positions: lower it.")

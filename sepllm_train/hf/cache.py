"""The base of the separator cache and its rivals, for unpatched transformers models.

Shape letters: B rows (sequences), W columns (keys, padding on the left), N new tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sep_attention import FOREVER
from torch import Tensor

from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.generation.policy import CachePolicy
from sepllm_train.generation.slots import Slots
from sepllm_train.hf.hooks import TokenCache, attach, base_of
from sepllm_train.hf.layers import SlotLayer
from sepllm_train.hf.rotary import Rotation

# States that assisted decoding can go back to; between two of them at least a token comes.
UNDO = 64
POSITIONS = ("cache", "training", "absolute")


@dataclass(frozen=True, eq=False)
class Held:
    """What a group of layers holds: never changed in place, so that an older state is a reference.

    length_sum: i64 [B], the sum of the cache's lengths at all tokens so far. dropped_at: columns seen when keys were
    dropped last.
    """

    slots: Slots
    length_sum: Tensor
    dropped_at: int = 0


class SlotCache(TokenCache):
    """A cache whose layers keep what their policies say.

    model: a transformers model, or the config of one that `attach` was called on. policies: one per layer. pattern:
    tells the separators among the tokens. positions: `cache`, where a key's position is its place in the cache, for
    texts of any length; `training`, where every key keeps its position in the text, up to the model's context length;
    or `absolute`, the same beyond that length, where a model fails: for comparison. block: most tokens of a forward at
    once; longer prompts are cut, which changes no result.

    A prompt is compressed as it comes: each token sees what it would have seen had the tokens come one by one. Batches
    are padded on the left. A further call goes on with the text; `reset` empties the cache.

    Attributes: columns_seen, tokens seen, padding included. Raises ValueError for what does not fit the model.
    """

    # What each of `policies` holds; empty until the first forward.
    held: list[Held]
    # Where the cache is not what the model was trained with, in words.
    differences: tuple[str, ...] = ()
    # The rows whose document has ended with their last token, bool [B].
    ended: Tensor
    _recording: bool
    # Distance of each column's key from where it arrived, where keys move.
    offset: Tensor
    _log: list[tuple[Any, ...]]

    def __init__(
        self, model: Any, policies: Sequence[CachePolicy], pattern: TokenPattern, *, positions: str, block: int = 1024
    ) -> None:
        base = base_of(model)
        self.base = weakref.ref(base)
        self.pattern = pattern
        self.positions = positions
        self.block = block
        # Layers that keep the same keys share their bookkeeping.
        self.policies = list(dict.fromkeys(policies))
        self.group_of_layer = [self.policies.index(policy) for policy in policies]
        self.context = _context(base.config.get_text_config())
        _check(base, self.policies, positions, self.context)
        attach(base)
        self.rotation = Rotation(base) if positions == "cache" else None
        super().__init__(layers=[SlotLayer(self, policy.capacity) for policy in policies])
        self._start()

    @property
    def moves(self) -> bool:
        """Whether keys move when others are dropped."""
        return self.rotation is not None

    @property
    def mean_length(self) -> float:
        """Keys in the cache at a token, its own included: counted, the mean over tokens, rows and layers."""
        if not self.held or not int(self.tokens.sum()):
            return 0.0
        sums = [int(held.length_sum.sum()) for held in self.held]
        total = sum(sums[group] for group in self.group_of_layer)
        return total / (int(self.tokens.sum()) * len(self.layers))

    @property
    def lengths(self) -> list[int]:
        """Keys of each row in the first layer now."""
        return self.held[self.group_of_layer[0]].slots.length.tolist() if self.held else []

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(layer.nbytes for layer in self.layers)

    def begin(self, rows: int, device: torch.device) -> None:
        """Start with `rows` sequences unless it has begun. Raises ValueError when it has begun with others."""
        if not self.held:
            none = torch.zeros(rows, dtype=torch.int64, device=device)
            self.held = [Held(Slots.empty(policy, rows, device), none) for policy in self.policies]
            self.offset = none.new_zeros(rows, 0)
            self.tokens, self.ended = none, none.bool()
        known = len(self.held[0].slots.length)
        if known != rows:
            raise ValueError(f"the cache holds {known} sequences and was given {rows}: call reset() before other ones.")

    def make_room(self) -> None:
        """Drop keys in the rows that are full, and all keys of documents that have ended."""
        if self.pattern.end_of_document is not None and bool(self.ended.any()):
            self._forget_documents()
        full = [bool(held.slots.full().any()) for held in self.held]
        if not any(full):
            return
        if self._recording:
            self._log = [*self._log[1 - UNDO :], self._state()]
        for group in (group for group, due in enumerate(full) if due):
            slots = self.held[group].slots
            kept, order = slots.drop()
            if self.moves:
                place = kept.columns()
                moved = place - slots.columns().gather(1, order)
                self.offset = torch.where(place >= 0, self.offset.gather(1, order) + moved, 0)
            for layer, number in zip(self.layers, self.group_of_layer, strict=True):
                if number == group:
                    layer.drop(order, self.offset if self.moves else None)
            self.held[group] = Held(kept, self.held[group].length_sum, self.columns_seen)

    def _forget_documents(self) -> None:
        """Rows whose document has ended begin anew, as in training with separate documents."""
        if self._recording:
            self._log = [*self._log[1 - UNDO :], self._state()]
        ended = self.ended
        self.held = [Held(held.slots.begun_anew(ended), held.length_sum, self.columns_seen) for held in self.held]
        self.ended = torch.zeros_like(ended)

    def fits(self, ids: Tensor, valid: Tensor) -> int:
        """How many of the next tokens, i64 and bool [B, N], come before a row is full or its document ends; at least 1
        after make_room."""
        count = valid[:, : self.block].cumsum(1)
        fit = torch.ones_like(count[0], dtype=torch.bool)
        for held in self.held:
            fit &= (count <= (held.slots.limit - held.slots.length)[:, None]).all(0)
        if self.pattern.end_of_document is not None:
            ends = ((ids[:, : self.block] == self.pattern.end_of_document) & valid[:, : self.block]).any(0).long()
            fit &= ends.cumsum(0) - ends == 0
        return int(fit.long().cumprod(0).sum())

    def append(self, ids: Tensor, valid: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Take N tokens, i64 and bool [B, N]; gives their position_ids, i64 [B, N], and the mask of what they see for
        each layer, bool [B, N, W] (one object for layers that share it). Raises ValueError beyond the context."""
        count = valid.cumsum(1)
        position = self.tokens[:, None] + count - 1
        if self.positions == "training":
            self._check_context(int(position[:, -1].max()) + 1)
        place = self.held[0].slots.length[:, None] + count - 1 if self.moves else position
        reach = self.pattern.reach(ids, position)
        masks = []
        for group, held in enumerate(self.held):
            lengths = torch.where(valid, held.slots.length[:, None] + count, 0).sum(1)
            slots = held.slots.append(reach, valid)
            self.held[group] = Held(slots, held.length_sum + lengths, held.dropped_at)
            masks.append(slots.visible(ids.shape[1]))
        if self.moves:
            self.offset = torch.cat((self.offset, torch.zeros_like(ids)), 1)
        self.columns_seen += ids.shape[1]
        self.pending = ids.shape[1]
        self.tokens = self.tokens + count[:, -1]
        if self.pattern.end_of_document is not None:
            self.ended = valid[:, -1] & (ids[:, -1] == self.pattern.end_of_document)
        return place.clamp(min=0), [masks[group] for group in self.group_of_layer]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Column of the next token."""
        return self.layers[layer_idx].get_mask_sizes(0)[0]

    def reset(self) -> None:
        """Forget all tokens."""
        for layer in self.layers:
            layer.reset()
        self._start()

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
        if not self.held:
            return
        rows = beam_idx.to(self.offset.device)
        self.held = [
            Held(held.slots.select(rows), held.length_sum.index_select(0, rows), held.dropped_at) for held in self.held
        ]
        self.offset = self.offset.index_select(0, rows)
        self.tokens, self.ended = self.tokens.index_select(0, rows), self.ended.index_select(0, rows)
        for layer in self.layers:
            layer.select(rows)
        self._log = []

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows numbered `indices`, i64 [B']."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.reorder_cache(torch.arange(len(self.offset)).repeat_interleave(repeats))

    def _start(self) -> None:
        self.columns_seen = 0
        self.pending = -1
        self.running = False
        self.pieces = []
        self.held = []
        self.offset = torch.zeros(0, 0, dtype=torch.int64)
        self.tokens = torch.zeros(0, dtype=torch.int64)
        self.ended = torch.zeros(0, dtype=torch.bool)
        self._recording = False
        self._log = []

    def _take_back(self, columns: int) -> None:
        if not columns:
            return
        for group, held in enumerate(self.held):
            slots = held.slots.without_last(columns)
            count = (held.slots.position[:, -columns:] >= 0).long()
            lengths = (count * (slots.length[:, None] + count.cumsum(1))).sum(1)
            self.held[group] = Held(slots, held.length_sum - lengths, held.dropped_at)
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

    def _check_context(self, tokens: int) -> None:
        if self.context is not None and tokens > self.context:
            raise ValueError(
                f"the text is {tokens} tokens long and the model's context {self.context}: with positions='training' "
                "it must fit; positions='cache' has no end."
            )


def _context(config: Any) -> int | None:
    """Positions up to which the model's rotary embedding is what it was trained with."""
    rope = getattr(config, "rope_parameters", None) or {}
    known = (getattr(config, "max_position_embeddings", None), rope.get("original_max_position_embeddings"))
    limits = [limit for limit in known if limit]
    scaled = rope.get("rope_type", "default") in ("llama3", "yarn", "linear")
    return (max if scaled else min)(limits) if limits else None


def _most_keys(policy: CachePolicy, context: int | None) -> int:
    """Keys that are to be seen as the model itself sees them; a pattern as a mask takes the place of its windows."""
    if policy.capacity is not None:
        return policy.capacity
    return (context or FOREVER) if policy.window >= FOREVER else 0


def own_window(config: Any) -> int | None:
    """Tokens within which some layer of a transformers model attends whatever its cache holds; None for all."""
    kinds = getattr(config, "layer_types", None)
    sliding = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True) if kinds is None else "sliding_attention" in kinds
    return sliding if used else None


def _check(base: Any, policies: Sequence[CachePolicy], positions: str, context: int | None) -> None:
    """Raise ValueError when the policies do not suit the model or the positions."""
    config, name = base.config.get_text_config(), type(base).__name__
    if positions not in POSITIONS:
        raise ValueError(f"positions={positions!r} is unknown: choose one of {', '.join(POSITIONS)}.")
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        raise ValueError(f"{name} has ALiBi positions, which depend on distances in the text: it needs a full cache.")
    capacity = max(_most_keys(policy, context) for policy in policies)
    sliding = own_window(config)
    if sliding is not None and capacity > sliding:
        raise ValueError(
            f"the cache may hold {capacity} keys, more than the model's own sliding window of {sliding}: give a "
            "capacity of at most that, the same in all layers."
        )
    if positions != "cache":
        return
    if len(policies) > 1 or policies[0].capacity is None:
        raise ValueError(
            "positions='cache' needs the same capacity in all layers: with layers that keep all their keys, or without "
            "a capacity, use positions='training'."
        )
    if context is not None and capacity > context:
        raise ValueError(f"capacity={capacity} is above the model's context of {context} positions: lower it.")

"""The separator cache: which keys it holds for each row, and the buffers that hold them.

Two adapters put it to use: `native.NativeCache` for our own model, `sepllm_train.hf.cache.SlotCache` for models of
transformers.

Shape letters: B rows (sequences), W columns (keys, padding on the left), N new tokens, G key heads, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.generation.slots import CachePolicy, Slots

# Positions of keys that our own model knows.
POSITIONS = ("training", "cache")
# Takes the keys [B, G, W, D] of a layer as they arrived; gives them rotated to where they are now.
Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Held:
    """Bookkeeping of a group of layers: never changed in place, so that an older state is a reference.

    length_sum: i64 [B], sum of the cache's lengths at all tokens so far. dropped_at: columns seen when keys were
    dropped last. room: columns that surely fit before a row is full; there may be more, after padding.
    """

    slots: Slots
    length_sum: Tensor
    dropped_at: int = 0
    room: int = 0

    @property
    def full(self) -> bool:
        """True when some row must drop keys before its next token."""
        return self.room <= 0 and bool(self.slots.full().any())


class KeyBuffers:
    """Keys and values [B, G, W, D] of one layer, in buffers with room for columns to come.

    capacity: the most columns there will be, None without an end.

    Attributes:
        width: W, the columns in use.
        arrived: the keys as they arrived, where keys move: rotated anew from these, they do not collect rounding
            errors.
    """

    width: int
    keys: Tensor | None
    values: Tensor | None
    arrived: Tensor | None

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.reset()

    def append(self, keys: Tensor, values: Tensor, arrived: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Append N columns, [B, G, N, D] each; returns all keys and values, [B, G, W, D]."""
        start, new = self.width, keys.shape[2]
        end = start + new
        if self.keys is None:
            room = self.capacity or 2 * new
            self.keys, self.values = _buffer(keys, room, 0), _buffer(values, room, 0)
            self.arrived = None if arrived is None else _buffer(arrived, room, 0)
        if end > self.keys.shape[2]:
            self._make_room(max(end, self.keys.shape[2] * 3 // 2))
        assert self.values is not None
        self.keys.narrow(2, start, new).copy_(keys)
        self.values.narrow(2, start, new).copy_(values)
        if self.arrived is not None and arrived is not None:
            self.arrived.narrow(2, start, new).copy_(arrived)
        self.width = end
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)

    def drop(self, order: Tensor, move: Move | None) -> None:
        """Keep the columns `order`, i64 [B, W']; `move` rotates keys that move.

        The buffers are new ones, so that an older state of the cache still has its own.
        """
        if self.keys is None or self.values is None:
            return
        room = self.keys.shape[2]
        self.values = _columns(self.values, order)
        if self.arrived is None:
            self.keys = _columns(self.keys, order)
        else:
            assert move is not None
            self.arrived = _columns(self.arrived, order)
            self.keys = move(self.arrived)
        self.width = order.shape[1]
        self._make_room(room)

    def select(self, rows: Tensor) -> None:
        """Keep the rows numbered `rows`, i64 [B']."""
        if self.keys is not None and self.values is not None:
            rows = rows.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
            self.arrived = None if self.arrived is None else self.arrived.index_select(0, rows)

    def take_back(self, columns: int) -> None:
        """Forget the last columns."""
        self.width -= columns

    def reset(self) -> None:
        """Forget everything."""
        self.restore((0, None, None, None))

    def state(self) -> tuple[Any, ...]:
        """State for `restore`: columns that are there now are not written again once keys are dropped."""
        return self.width, self.keys, self.values, self.arrived

    def restore(self, state: tuple[Any, ...]) -> None:
        """Go back to an older state."""
        self.width, self.keys, self.values, self.arrived = state

    def tensors(self) -> dict[str, Tensor]:
        """Contents by name, without the room to come."""
        held = {"keys": self.keys, "values": self.values, "arrived": self.arrived}
        return {name: tensor[:, :, : self.width] for name, tensor in held.items() if tensor is not None}

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Hold the result of `tensors`."""
        if tensors:
            self.restore((tensors["keys"].shape[2], tensors["keys"], tensors["values"], tensors.get("arrived")))
            self._make_room(max(self.capacity or 0, self.width))

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(held.nbytes for held in (self.keys, self.values, self.arrived) if held is not None)

    def _make_room(self, room: int) -> None:
        held = (self.keys, self.values, self.arrived)
        self.keys, self.values, self.arrived = (None if one is None else _buffer(one, room, self.width) for one in held)


class SeparatorCache(ABC):
    """Keys of a batch of texts in every layer of a model, kept as `policies` say, one per layer.

    pattern: tells the separators among the tokens. positions: `cache`, where the position of a key is its place in the
    cache and changes when others are dropped; anything else leaves keys where they are in the text. block: most tokens
    of a forward at once; longer prompts are cut, which changes no result. context: the longest text in
    tokens, None without an end; with positions `training` a longer one is refused.

    A forward takes its tokens in pieces: `make_room`, `fits`, `append`, then the layers add their keys to `layers`.
    Each token sees what it would have seen had the tokens come one by one. Batches are padded on the left. Where the
    pattern separates documents, a row forgets all its keys after the token that ends one.

    Attributes:
        policies: the different policies; layers with the same one share their bookkeeping.
        group_of_layer: for each layer the index of its policy in `policies` and `held`.
        held: bookkeeping of each policy; empty until `begin`.
        columns_seen: tokens seen, padding included.
        tokens: i64 [B], tokens of each row.
        ended: bool [B], rows whose document has ended with their last token.
        offset: i64 [B, W], distance of each key from the place where it arrived; [B, 0] where keys do not move.
    """

    layers: Sequence[KeyBuffers]
    held: list[Held]
    columns_seen: int
    tokens: Tensor
    ended: Tensor
    offset: Tensor

    def __init__(
        self,
        policies: Sequence[CachePolicy],
        pattern: TokenPattern,
        *,
        positions: str,
        block: int,
        context: int | None = None,
    ) -> None:
        self.policies = list(dict.fromkeys(policies))
        self.group_of_layer = [self.policies.index(policy) for policy in policies]
        self.pattern = pattern
        self.positions = positions
        self.block = block
        self.context = context
        self._forget_all()

    @property
    def moves(self) -> bool:
        """True when keys move as others are dropped."""
        return self.positions == "cache"

    def mean_lengths(self) -> list[float]:
        """Keys in the cache at a token of each row, its own included: the mean over its tokens and the layers."""
        return (self._length_sums() / (self.tokens * len(self.layers)).clamp(min=1)).tolist()

    @property
    def mean_length(self) -> float:
        """Keys in the cache at a token, its own included: counted, the mean over tokens, rows and layers."""
        tokens = int(self.tokens.sum())
        return int(self._length_sums().sum()) / (tokens * len(self.layers)) if tokens else 0.0

    def lengths_of_layers(self) -> list[list[int]]:
        """Keys of each row now, for every layer."""
        return [self.held[group].slots.length.tolist() for group in self.group_of_layer] if self.held else []

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
            self._before_dropping()
            self.held = [
                Held(held.slots.begun_anew(self.ended), held.length_sum, self.columns_seen) for held in self.held
            ]
            self.ended = torch.zeros_like(self.ended)
        full = [group for group, held in enumerate(self.held) if held.full]
        if full:
            self._before_dropping()
        for group in full:
            slots = self.held[group].slots
            kept, order = slots.drop()
            move = None
            if self.moves:
                place = kept.columns()
                moved = place - slots.columns().gather(1, order)
                self.offset = torch.where(place >= 0, self.offset.gather(1, order) + moved, 0)
                move = self._move_to(place)
            for layer, number in zip(self.layers, self.group_of_layer, strict=True):
                if number == group:
                    layer.drop(order, move)
            self.held[group] = Held(kept, self.held[group].length_sum, self.columns_seen)

    def fits(self, ids: Tensor, valid: Tensor) -> int:
        """Number of the next tokens, i64 and bool [B, N], that come before a row is full or its document ends; at
        least 1 after make_room."""
        if ids.shape[1] == 1:
            return 1
        ids, valid = ids[:, : self.block], valid[:, : self.block]
        count = valid.cumsum(1)
        fit = torch.ones_like(count[0], dtype=torch.bool)
        for held in self.held:
            fit &= (count <= (held.slots.limit - held.slots.length)[:, None]).all(0)
        if self.pattern.end_of_document is not None:
            ends = ((ids == self.pattern.end_of_document) & valid).any(0).long()
            fit &= ends.cumsum(0) - ends == 0
        return int(fit.long().cumprod(0).sum())

    def append(self, ids: Tensor, valid: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Take N tokens, i64 and bool [B, N], which all fit.

        Returns their positions, i64 [B, N], and the mask of what they see for each layer, bool [B, N, W] (one object
        for layers that share it). Raises ValueError beyond the context.
        """
        new = ids.shape[1]
        count = valid.cumsum(1)
        position = self.tokens[:, None] + count - 1
        if self.positions == "training" and self.context is not None and self.columns_seen + new > self.context:
            check_context(int(position[:, -1].max()) + 1, self.context)
        place = self.held[0].slots.length[:, None] + count - 1 if self.moves else position
        reach = self.pattern.reach(ids, position)
        masks = []
        for group, held in enumerate(self.held):
            lengths = torch.where(valid, held.slots.length[:, None] + count, 0).sum(1)
            room = held.room if held.room > 0 else int((held.slots.limit - held.slots.length).min())
            slots = held.slots.append(reach, valid)
            self.held[group] = Held(slots, held.length_sum + lengths, held.dropped_at, room - new)
            masks.append(slots.visible(new))
        if self.moves:
            self.offset = torch.cat((self.offset, torch.zeros_like(ids)), 1)
        self.columns_seen += new
        self.tokens = self.tokens + count[:, -1]
        if self.pattern.end_of_document is not None:
            self.ended = valid[:, -1] & (ids[:, -1] == self.pattern.end_of_document)
        return place.clamp(min=0), [masks[group] for group in self.group_of_layer]

    def select(self, rows: Tensor) -> None:
        """Keep the rows numbered `rows`, i64 [B']."""
        rows = rows.to(self.tokens.device)
        self.held = [
            Held(held.slots.select(rows), held.length_sum.index_select(0, rows), held.dropped_at, held.room)
            for held in self.held
        ]
        self.offset = self.offset.index_select(0, rows)
        self.tokens, self.ended = self.tokens.index_select(0, rows), self.ended.index_select(0, rows)
        for layer in self.layers:
            layer.select(rows)

    @abstractmethod
    def _move_to(self, place: Tensor) -> Move:
        """Rotation of arrived keys to the places in the cache, i64 [B, W], where they are now."""

    def _before_dropping(self) -> None:
        """Called before keys are dropped: a cache that can go back notes its state."""
        return None

    def _forget_all(self) -> None:
        """Be as before `begin`, but for the buffers."""
        self.columns_seen = 0
        self.held = []
        self.offset = torch.zeros(0, 0, dtype=torch.int64)
        self.tokens = torch.zeros(0, dtype=torch.int64)
        self.ended = torch.zeros(0, dtype=torch.bool)

    def _length_sums(self) -> Tensor:
        """i64 [B], sum over tokens and layers of the keys that were there."""
        sums = torch.zeros_like(self.tokens)
        for group, held in enumerate(self.held):
            sums = sums + held.length_sum * self.group_of_layer.count(group)
        return sums


def check_context(tokens: int, context: int | None) -> None:
    """Raise ValueError when a text of `tokens` tokens with positions of training passes the model's context."""
    if context is not None and tokens > context:
        raise ValueError(
            f"the text is {tokens} tokens long and the model's context {context}: with positions='training' it must "
            "fit; positions='cache' has no end."
        )


def check_positions(positions: str, policies: Sequence[CachePolicy], known: Sequence[str] = POSITIONS) -> None:
    """Raise ValueError when positions are not among the `known` ones, or keys cannot have them."""
    if positions not in known:
        raise ValueError(f"positions={positions!r} is unknown: choose one of {', '.join(known)}.")
    if positions == "cache" and (len(set(policies)) > 1 or policies[0].capacity is None):
        raise ValueError(
            "positions='cache' needs the same capacity in all layers: with layers that keep all their keys, or without "
            "a capacity, use positions='training'."
        )


def _buffer(like: Tensor, room: int, used: int) -> Tensor:
    """Buffer of `room` columns, the first `used` of them those of `like` [B, G, *, D]."""
    wide = like.new_empty(like.shape[0], like.shape[1], room, like.shape[3])
    wide[:, :, :used] = like[:, :, :used]
    return wide


def _columns(held: Tensor, order: Tensor) -> Tensor:
    """Columns `order`, i64 [B, W'], of [B, G, *, D]."""
    return held.gather(2, order[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3]))

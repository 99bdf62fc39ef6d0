"""Our model with a cache of keys: the bookkeeping is that of the caches for transformers models.

Shape letters: B rows (sequences), W columns (keys, padding on the left), N new tokens, H query heads, G key heads, D
features of a head, of which R are rotary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.generation.policy import CachePolicy
from sepllm_train.generation.slots import Slots
from sepllm_train.model.gpt import SepGPTModel
from sepllm_train.model.sequence import DecodeSequence

POSITIONS = ("training", "cache")
# Queries of a layer with sinks whose scores exist at once.
_QUERIES = 128


class NativeCache:
    """The keys and values of `rows` texts in each layer of a model, kept as `policies` say, one per layer.

    pattern: tells the separators among the tokens. positions: `training`, where a key is compared at its position in
    the text, or `cache`, at its place in the cache. block: most tokens of a forward at once; longer prompts are cut,
    which changes no result. Under tensor parallelism every rank has its own heads and the same columns.

    Where the pattern separates documents, a row forgets all its keys after the token that ends one.

    Raises ValueError as `check_positions` does.
    """

    def __init__(
        self,
        model: SepGPTModel,
        pattern: TokenPattern,
        policies: Sequence[CachePolicy],
        rows: int,
        *,
        positions: str = "training",
        block: int = 1024,
    ) -> None:
        # Layers that keep the same keys share their bookkeeping.
        self.policies = list(dict.fromkeys(policies))
        check_positions(positions, self.policies)
        self.model = model
        self.device = next(model.parameters()).device
        self.pattern = replace(pattern, tier_of_token=pattern.tier_of_token.to(self.device))
        self.positions = positions
        self.block = block
        self._group_of_layer = [self.policies.index(policy) for policy in policies]
        self._slots = [Slots.empty(policy, rows, self.device) for policy in self.policies]
        self._layers = [_Layer() for _ in policies]
        # Tokens of each row, and the sum over them and the layers of the keys that were there.
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self._length_sum = torch.zeros_like(self._tokens)
        self._columns = 0
        # Rotary angles [positions, R] of the first positions.
        self._angle_table: Tensor | None = None
        # Of the piece that is running: what each group of layers sees, and cosines and sines of the new positions.
        self._masks: list[Tensor] = []
        self._rotation: tuple[Tensor, Tensor] | None = None

    @property
    def moves(self) -> bool:
        """Whether keys move when others are dropped."""
        return self.positions == "cache"

    @property
    def lengths(self) -> list[list[int]]:
        """Keys of each row now, in each layer."""
        return [self._slots[group].length.tolist() for group in self._group_of_layer]

    def mean_lengths(self) -> list[float]:
        """Keys in the cache at a token of each row, its own included: the mean over its tokens and the layers."""
        return (self._length_sum / (self._tokens * len(self._layers)).clamp(min=1)).tolist()

    @torch.no_grad()
    def feed(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """Append N tokens to each row, i64 [B, N]; gives the logits of the token after the last, fp32 [B, vocabulary].

        valid: bool [B, N], False for padding before a row's first token; None without padding. Each token sees what it
        would have seen had the tokens come one by one. Raises ValueError for padding in another place.
        """
        if valid is None:
            valid = torch.ones_like(ids, dtype=torch.bool)
        elif bool((valid[:, :-1] & ~valid[:, 1:]).any()) or bool(((self._tokens > 0)[:, None] & ~valid).any()):
            raise ValueError("a row of the batch has padding after its first token: pad on the left.")
        start = 0
        while True:
            self._make_room()
            end = start + self._fits(ids[:, start:], valid[:, start:])
            piece, there = ids[:, start:end], valid[:, start:end]
            self._append(piece, there)
            logits = self.model.next_token_logits(piece, DecodeSequence.of_cache(self))
            self._end_documents(piece[:, -1], there[:, -1])
            if end == ids.shape[1]:
                return logits.float()
            start = end

    def select(self, rows: Tensor) -> None:
        """Keep the rows numbered `rows`, i64 [B']."""
        rows = rows.to(self.device)
        self._slots = [slots.select(rows) for slots in self._slots]
        self._tokens, self._length_sum = self._tokens[rows], self._length_sum[rows]
        for layer in self._layers:
            layer.select(rows)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, sink: Tensor | None
    ) -> Tensor:
        """See `KeyCache.attend`."""
        held = self._layers[layer]
        arrived = {"values": value, "arrived": key} if self.moves else {"values": value}
        if self._rotation is not None:
            query, key = self.model.pointwise.rotate(query, key, *self._rotation)
        held.append(keys=key, **arrived)
        mask = self._masks[self._group_of_layer[layer]]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out = _attention(query.permute(1, 2, 0, 3), held["keys"], held["values"], mask, scale, sink)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _make_room(self) -> None:
        """Drop keys in the rows that are full."""
        for group, slots in enumerate(self._slots):
            if not bool(slots.full().any()):
                continue
            self._slots[group], order = slots.drop()
            # Keys that move are rotated anew from how they arrived: they do not collect rounding errors.
            rotation = self._angles(self._slots[group].columns()) if self.moves else None
            for layer, number in zip(self._layers, self._group_of_layer, strict=True):
                if number != group:
                    continue
                layer.keep(order)
                if rotation is not None:
                    keys = layer["arrived"].permute(2, 0, 1, 3)
                    # Two tensors are rotated together; here one of them has no heads.
                    layer["keys"] = self.model.pointwise.rotate(keys, keys[:, :, :0], *rotation)[0].permute(1, 2, 0, 3)

    def _fits(self, ids: Tensor, valid: Tensor) -> int:
        """How many of the next tokens, [B, N], come before a row is full or its document ends; at least 1 after
        `_make_room`."""
        if ids.shape[1] == 1:
            return 1
        valid = valid[:, : self.block]
        count = valid.cumsum(1)
        fit = torch.ones_like(count[0], dtype=torch.bool)
        for slots in self._slots:
            fit &= (count <= (slots.limit - slots.length)[:, None]).all(0)
        if self.pattern.end_of_document is not None:
            ends = ((ids[:, : self.block] == self.pattern.end_of_document) & valid).any(0).long()
            fit &= ends.cumsum(0) - ends == 0
        return int(fit.long().cumprod(0).sum())

    def _append(self, ids: Tensor, valid: Tensor) -> None:
        """Take N tokens, i64 and bool [B, N], which all fit."""
        self._columns += ids.shape[1]
        count = valid.cumsum(1)
        position = self._tokens[:, None] + count - 1
        place = self._slots[0].length[:, None] + count - 1 if self.moves else position
        reach = self.pattern.reach(ids, position)
        for group, slots in enumerate(self._slots):
            lengths = torch.where(valid, slots.length[:, None] + count, 0).sum(1)
            self._length_sum = self._length_sum + lengths * self._group_of_layer.count(group)
            self._slots[group] = slots.append(reach, valid)
        self._tokens = self._tokens + count[:, -1]
        self._masks = [slots.visible(ids.shape[1]) for slots in self._slots]
        self._rotation = self._angles(place)

    def _end_documents(self, ids: Tensor, valid: Tensor) -> None:
        """Forget the keys of rows whose document ends with the token that was appended last, i64 and bool [B]."""
        if self.pattern.end_of_document is None:
            return
        ended = valid & (ids == self.pattern.end_of_document)
        for group, slots in enumerate(self._slots):
            self._slots[group] = slots.begun_anew(ended)

    def _angles(self, position: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines, [N, B, 1, R], at positions i64 [B, N]; None for a model without rotary embedding."""
        if self.model.rotary_pos_emb is None:
            return None
        end = self.policies[0].capacity if self.moves else self._columns
        if self._angle_table is None or len(self._angle_table) < (end or 1):
            # Grown by doubling, so that few tables are made.
            self._angle_table = self.model.rotary_pos_emb.get_emb(1 << (end or 1).bit_length())[:, 0, 0]
        angles = self._angle_table[position.clamp(min=0).t()][:, :, None]
        dtype = self.model.config.params_dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)


class _Layer:
    """Tensors [B, G, W, D] of a layer by name, in buffers with room for columns to come."""

    def __init__(self) -> None:
        self._width = 0
        self._held: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._held[name][:, :, : self._width]

    def __setitem__(self, name: str, columns: Tensor) -> None:
        self._held[name][:, :, : self._width] = columns

    def append(self, **new: Tensor) -> None:
        """Append columns to every tensor, given as [N, B, G, D]."""
        start = self._width
        for name, tensor in new.items():
            self._width = start + len(tensor)
            self._make_room(name, tensor)
            self._held[name][:, :, start : self._width] = tensor.permute(1, 2, 0, 3)

    def keep(self, order: Tensor) -> None:
        """Keep the columns `order`, i64 [B, W']."""
        kept = {name: self[name] for name in self._held}
        self._width = order.shape[1]
        for name, tensor in kept.items():
            self[name] = tensor.gather(2, order[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))

    def select(self, rows: Tensor) -> None:
        """Keep the rows numbered `rows`, i64 [B']."""
        self._held = {name: tensor.index_select(0, rows) for name, tensor in self._held.items()}

    def _make_room(self, name: str, like: Tensor) -> None:
        _, rows, heads, features = like.shape
        held = self._held.get(name)
        room = 0 if held is None else held.shape[2]
        if self._width > room:
            self._held[name] = like.new_empty(rows, heads, max(self._width, room * 3 // 2), features)
            if held is not None:
                self._held[name][:, :, :room] = held


def _attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, sink: Tensor | None) -> Tensor:
    """Attention of query [B, H, N, D] to keys and values [B, G, W, D] where mask, bool [B, N, W], is True.

    sink: [H], logits of an extra softmax column that carries no value. Gives [B, H, N, D].
    """
    if sink is not None and query.shape[2] > _QUERIES:
        parts = zip(query.split(_QUERIES, 2), mask.split(_QUERIES, 1), strict=True)
        return torch.cat([_attention(some, keys, values, seen, scale, sink) for some, seen in parts], 2)
    heads, new = query.shape[1], query.shape[2]
    shared = heads // keys.shape[1]
    # The query heads of a key head as if they were positions: [B, G, H / G * N, D].
    query = query.unflatten(1, (-1, shared)).flatten(2, 3)
    mask = mask.repeat(1, shared, 1)[:, None]
    if sink is None:
        out = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    else:
        scores = (query @ keys.transpose(-1, -2)).float().mul_(scale).masked_fill_(~mask, float("-inf"))
        column = sink.float().view(-1, shared, 1).expand(-1, -1, new).flatten(1)[None, :, :, None]
        weights = torch.cat((scores, column.expand(len(scores), -1, -1, -1)), -1).softmax(-1)[..., :-1]
        out = weights.to(values.dtype) @ values
    return out.unflatten(2, (shared, new)).flatten(1, 2)


def check_positions(positions: str, policies: Sequence[CachePolicy]) -> None:
    """Raise ValueError when keys cannot have such positions."""
    if positions not in POSITIONS:
        raise ValueError(f"positions={positions!r} is unknown: choose one of {', '.join(POSITIONS)}.")
    if positions == "cache" and (len(policies) > 1 or policies[0].capacity is None):
        raise ValueError(
            "positions='cache' needs the same capacity in all layers: with layers that keep all their keys, or without "
            "a capacity, use positions='training'."
        )

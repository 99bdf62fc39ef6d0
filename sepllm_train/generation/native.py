"""The separator cache for our own model: rotary positions and attention of the layers.

Shape letters: B rows (sequences), W columns (keys, padding on the left), N new tokens, H query heads, G key heads, D
features of a head, of which R are rotary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sepllm_train.distributed.cpu import undisturbed
from sepllm_train.generation.cache import KeyBuffers, Move, SeparatorCache, check_positions
from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.generation.slots import CachePolicy
from sepllm_train.model.gpt import SepGPTModel
from sepllm_train.model.pointwise import rotate_one
from sepllm_train.model.sequence import DecodeSequence

# Queries of a layer with sinks whose scores exist at once.
_QUERIES = 128


class NativeCache(SeparatorCache):
    """The cache of `rows` texts for a model of ours; policies, pattern and block as in SeparatorCache.

    positions: `training`, where a key is compared at its position in the text, or `cache`, at its place in the cache.
    Under tensor parallelism every rank has its own heads and the same columns.

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
        check_positions(positions, policies)
        self.model = model
        self.device = next(model.parameters()).device
        pattern = replace(pattern, tier_of_token=pattern.tier_of_token.to(self.device))
        super().__init__(policies, pattern, positions=positions, block=block)
        self.layers = [KeyBuffers(policy.capacity) for policy in policies]
        self.begin(rows, self.device)
        # Rotary angles [positions, R] of the first positions.
        self._angle_table: Tensor | None = None
        # Of the piece that is running: what is added to the scores of each layer, 0 or -inf, [B, 1, N, W], and cosines
        # and sines of the new positions.
        self._added: list[Tensor] = []
        self._rotation: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def feed(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """Append N tokens to each row, i64 [B, N]; returns the logits of the next token, fp32 [B, vocabulary].

        valid: bool [B, N], False for padding before a row's first token; None without padding. Raises ValueError for
        padding in another place.
        """
        if valid is None:
            valid = torch.ones_like(ids, dtype=torch.bool)
        elif bool((valid[:, :-1] & ~valid[:, 1:]).any()) or bool(((self.tokens > 0)[:, None] & ~valid).any()):
            raise ValueError("a row of the batch has padding after its first token: pad on the left.")
        start = 0
        with undisturbed():
            while True:
                self.make_room()
                end = start + self.fits(ids[:, start:], valid[:, start:])
                piece = ids[:, start:end]
                place, masks = self.append(piece, valid[:, start:end])
                self._added = self._as_added(masks)
                self._rotation = self._angles(place)
                logits = self.model.next_token_logits(piece, DecodeSequence.of_cache(self))
                if end == ids.shape[1]:
                    return logits.float()
                start = end

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, sink: Tensor | None
    ) -> Tensor:
        """See `KeyCache.attend`."""
        arrived = key if self.moves else None
        if self._rotation is not None:
            both = rotate_one(torch.cat((query, key), 2), *self._rotation)
            query, key = both.split((query.shape[2], key.shape[2]), 2)
        keys, values = self.layers[layer].append(
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            None if arrived is None else arrived.permute(1, 2, 0, 3),
        )
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out = _attention(query.permute(1, 2, 0, 3), keys, values, self._added[layer], scale, sink)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _move_to(self, place: Tensor) -> Move:
        rotation = self._angles(place.clamp(min=0))

        def move(arrived: Tensor) -> Tensor:
            if rotation is None:
                return arrived
            return rotate_one(arrived.permute(2, 0, 1, 3), *rotation).permute(1, 2, 0, 3)

        return move

    def _as_added(self, masks: list[Tensor]) -> list[Tensor]:
        """Terms of scores, [B, 1, N, W], for masks bool [B, N, W]: one tensor for the layers that share a mask."""
        dtype = self.model.config.params_dtype
        added: dict[int, Tensor] = {}
        for mask in masks:
            if id(mask) not in added:
                zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
                added[id(mask)] = zeros.masked_fill_(~mask, float("-inf"))
        return [added[id(mask)][:, None] for mask in masks]

    def _angles(self, position: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines, [N, B, 1, R], at positions i64 [B, N]; None for a model without rotary embedding."""
        if self.model.rotary_pos_emb is None:
            return None
        end = self.policies[0].capacity if self.moves else self.columns_seen
        if self._angle_table is None or len(self._angle_table) < (end or 1):
            # Grown by doubling, so that few tables are made.
            self._angle_table = self.model.rotary_pos_emb.get_emb(1 << (end or 1).bit_length())[:, 0, 0]
        return self.model.rotation_by(self._angle_table[position.t()][:, :, None])


def _attention(query: Tensor, keys: Tensor, values: Tensor, added: Tensor, scale: float, sink: Tensor | None) -> Tensor:
    """Attention of query [B, H, N, D] to keys and values [B, G, W, D]; added [B, 1, N, W] hides keys where it is -inf.

    sink: [H], logits of an extra softmax column that carries no value. Gives [B, H, N, D].
    """
    if sink is not None and query.shape[2] > _QUERIES:
        parts = zip(query.split(_QUERIES, 2), added.split(_QUERIES, 2), strict=True)
        return torch.cat([_attention(some, keys, values, seen, scale, sink) for some, seen in parts], 2)
    heads, new = query.shape[1], query.shape[2]
    shared = heads // keys.shape[1]
    # The query heads of a key head as if they were positions: [B, G, H / G * N, D].
    query = query.unflatten(1, (-1, shared)).flatten(2, 3)
    if shared > 1:
        added = added.repeat(1, 1, shared, 1)
    if sink is None:
        out = scaled_dot_product_attention(query, keys, values, attn_mask=added, scale=scale)
    else:
        scores = (query @ keys.transpose(-1, -2)).float().mul_(scale).add_(added)
        column = sink.float().view(-1, shared, 1).expand(-1, -1, new).flatten(1)[None, :, :, None]
        weights = torch.cat((scores, column.expand(len(scores), -1, -1, -1)), -1).softmax(-1)[..., :-1]
        out = weights.to(values.dtype) @ values
    return out.unflatten(2, (shared, new)).flatten(1, 2)

"""Moving keys of a Hugging Face model to other positions, with the model's own rotary embedding."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sepllm_train.hf.hooks import cache_argument

_TOLERANCE = 1e-4
# Keys of half precision are rounded where they are rotated.
_HALF_TOLERANCE = 0.05
# Kinds of models that rotate pairs of neighbouring features, by sines in a table that ends at their context.
_NEIGHBOURS = ("gptj", "codegen")
_PAIRS = "the model's rotary embedding pairs neighbouring features: it has no static cache."


class _Neighbours:
    """The rotary embedding of GPT-J and CodeGen, in the form of the other models' and for distances of any sign."""

    def __init__(self, config: Any) -> None:
        features = config.rotary_dim or config.hidden_size
        self._rates = 10000.0 ** (-torch.arange(0, features, 2) / features)

    def __call__(self, keys: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, W, R] of distances, i64 [B, W]."""
        angle = (distance[..., None] * self._rates.to(distance.device)).repeat_interleave(2, -1)
        return angle.cos(), angle.sin()

    @staticmethod
    def apply(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        """Both [B, H, W, R] rotated."""
        turned = (torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) for x in (query, key))
        cosine, sine = cosine[:, None], sine[:, None]
        return query * cosine + next(turned) * sine, key * cosine + next(turned) * sine


class Rotation:
    """Rotates keys by a distance, as the rotary embedding of `base` (a model without its head) does.

    Partial rotary, scaled frequencies (llama3, YaRN, dynamic below the original length) and interleaved pairs are the
    model's own code and right by themselves; a scale on cosines and sines is taken out, as the keys have it already.
    Raises ValueError for a model whose keys this does not move rightly in every layer: that is tried out here.
    """

    def __init__(self, base: Any) -> None:
        if base.sepllm_layer_masks.biases is not None:
            raise ValueError(
                f"{type(base).__name__} has ALiBi positions, which are distances in the text: use positions='training'."
            )
        if base.config.model_type in _NEIGHBOURS:
            rotary: Any = _Neighbours(base.config)
            apply = rotary.apply
        else:
            rotary = getattr(base, "rotary_emb", None)
            apply = getattr(sys.modules[type(base).__module__], "apply_rotary_pos_emb", None)
        if rotary is None or apply is None:
            raise ValueError(
                f"{type(base).__name__} has no rotary position embedding that can be moved: use positions='training'."
            )
        self._rotary, self._apply = rotary, apply
        self._scale = float(getattr(rotary, "attention_scaling", 1.0))
        self._try_out(base)

    def __call__(self, keys: Tensor, distance: Tensor) -> Tensor:
        """Keys [B, H, W, D] that were rotated to some positions, now to those plus `distance`, i64 [B, W]."""
        cosine, sine = self._rotary(keys.float(), distance)
        features = cosine.shape[-1]
        rotating = keys[..., :features].float()
        turned = self._apply(rotating, rotating, cosine / self._scale, sine / self._scale)[1]
        return torch.cat((turned.to(keys.dtype), keys[..., features:]), -1)

    def frequencies(self, features: int) -> Tensor:
        """Angle in radians by which one position turns each pair of features, fp32 [R / 2], feature i being paired with
        i + R / 2, for keys of `features`. Raises ValueError for a model that pairs them otherwise."""
        found = getattr(self._rotary, "inv_freq", None)
        if found is None:
            raise ValueError(_PAIRS)
        found = found.float()
        keys = torch.randn(1, 1, 1, features, generator=torch.Generator().manual_seed(0)).to(found.device)
        turned = self(keys, torch.tensor([[5]], device=found.device))
        half = len(found)
        first, second, rest = keys.split((half, half, features - 2 * half), -1)
        cosine, sine = (5 * found).cos(), (5 * found).sin()
        known = torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), -1)
        if not float((turned - known).abs().max()) < _TOLERANCE:
            raise ValueError(_PAIRS)
        return found

    def _try_out(self, base: Any) -> None:
        """Let the model rotate one token's keys at two positions: what lies between is what this must do.

        The hidden states of a token alone do not depend on its position. Layers without rotary embedding, and keys of
        which it turns other features than the first, are found so.
        """
        wrong = f"the keys of {type(base).__name__} are not moved by rotation in every layer: use positions='training'."
        try:
            at_11, at_8 = (_keys_at(base, position) for position in (11, 8))
            back = torch.tensor([[-3]], device=base.device)
            moved = [self(keys, back) for keys in at_11]
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
            raise ValueError(wrong) from error
        for found, known in zip(moved, at_8, strict=True):
            off = (found.float() - known.float()).abs().max() / known.float().abs().max().clamp(min=1e-6)
            if not float(off) < (_TOLERANCE if known.dtype == torch.float32 else _HALF_TOLERANCE):
                raise ValueError(wrong)


@torch.no_grad()
def _keys_at(base: Any, position: int) -> list[Tensor]:
    """Keys [1, G, 1, D] of each layer for a token at a position, in transformers' own cache."""
    cache, training = DynamicCache(), base.training
    # The embedding of padding is zero.
    token = 1 if getattr(base.config.get_text_config(), "pad_token_id", None) == 0 else 0
    ids = torch.full((1, 1), token, device=base.device)
    pattern, base.sepllm_pattern = getattr(base, "sepllm_pattern", None), None
    try:
        base.eval()
        mask = torch.zeros(1, 1, 1, 1, dtype=base.dtype, device=base.device)
        base(
            input_ids=ids,
            attention_mask=mask,
            position_ids=torch.full_like(ids, position),
            use_cache=True,
            **{cache_argument(base): cache},
        )
    finally:
        base.train(training)
        base.sepllm_pattern = pattern
    return [layer.keys for layer in cache.layers]

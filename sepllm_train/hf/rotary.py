"""Moving keys of a Hugging Face model to other positions, with the model's own rotary embedding."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

_TOLERANCE = 1e-4


class Rotation:
    """Rotates keys by a distance, as the rotary embedding of `base` (a model without its head) does.

    Partial rotary, scaled frequencies (llama3, YaRN, dynamic below the original length) and interleaved pairs are the
    model's own code and right by themselves; a scale on cosines and sines is taken out, as the keys have it already.
    Raises ValueError for a model whose keys this does not move rightly: that is tried out here.
    """

    def __init__(self, base: Any) -> None:
        rotary = getattr(base, "rotary_emb", None)
        apply = getattr(sys.modules[type(base).__module__], "apply_rotary_pos_emb", None)
        if rotary is None or apply is None:
            raise ValueError(
                f"{type(base).__name__} has no rotary position embedding that can be moved: use positions='training'."
            )
        self._rotary, self._apply = rotary, apply
        self._scale = float(getattr(rotary, "attention_scaling", 1.0))
        self._try_out(type(base).__name__)

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
        found = self._rotary.inv_freq.float()
        keys = torch.randn(1, 1, 1, features, generator=torch.Generator().manual_seed(0)).to(found.device)
        turned = self(keys, torch.tensor([[5]], device=found.device))
        half = len(found)
        first, second, rest = keys.split((half, half, features - 2 * half), -1)
        cosine, sine = (5 * found).cos(), (5 * found).sin()
        known = torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), -1)
        if not float((turned - known).abs().max()) < _TOLERANCE:
            raise ValueError("the model's rotary embedding pairs neighbouring features: it has no static cache.")
        return found

    def _try_out(self, name: str) -> None:
        device = next(self._rotary.buffers()).device
        features = self._rotary(torch.zeros(1, device=device), torch.zeros(1, 1, dtype=torch.int64, device=device))[0]
        keys = torch.randn(
            1, 1, 1, features.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float32
        ).to(device)

        def at(position: int) -> Tensor:
            place = torch.tensor([[position]], device=device)
            return self._apply(keys, keys, *self._rotary(keys, place))[1]

        moved = self(at(11), torch.tensor([[-3]], device=device))
        error = float((moved - at(8)).abs().max())
        if not error < _TOLERANCE:
            raise ValueError(
                f"the rotary embedding of {name} does not move keys by rotation (error {error:.2g}): use "
                "positions='training'."
            )

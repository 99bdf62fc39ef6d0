"""Masks of keys in the form of transformers' models.

Shape letters: B rows (sequences), N new tokens, W keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """bool [B, N, W] as [B, 1, N, W]: 0 where a key is seen, the least number of `dtype` where it is not."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)[:, None]

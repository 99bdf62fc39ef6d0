"""Rotary frequencies of a model, scaled for contexts longer than those of training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sepllm_train.config.schema import ModelConfig


def scaled_frequencies(model: ModelConfig, plain: Tensor) -> Tensor:
    """Frequencies by `model.rotary_scaling`, in radians per position, fp32 [R / 2].

    plain: those of the base `model.rotary_theta`, the fastest first. `linear` divides them by factor, `llama3` and
    `yarn` the slow ones, with a ramp between. As transformers' `modeling_rope_utils`.
    """
    scaling = model.rotary_scaling
    if scaling.rope_type in (None, "ntk"):
        return plain
    assert scaling.factor is not None
    stretched = plain / scaling.factor
    if scaling.rope_type == "linear":
        return stretched
    if scaling.rope_type == "yarn":
        first, last = scaling.ramp(model.rotary_base, model.rotary_features)
        # A ramp of no length is a step.
        kept = 1 - (torch.arange(len(plain), device=plain.device) - first) / ((last - first) or 0.001)
    else:
        assert scaling.original_max_position_embeddings is not None
        assert scaling.low_freq_factor is not None and scaling.high_freq_factor is not None
        rotations = scaling.original_max_position_embeddings * plain / (2 * math.pi)
        kept = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(stretched, plain, kept.clamp(0, 1))

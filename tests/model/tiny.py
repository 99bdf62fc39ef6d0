"""Small models and micro-batches that the tests of the model share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sep_attention import AttentionPlan
from torch import Tensor

from sepllm_train.config.schema import (
    AttentionConfig,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
)
from sepllm_train.model.pattern import resolve_pattern

VOCABULARY = 100
LENGTH = 48
PYTHIA = {"layers": 4, "hidden": 64, "heads": 4, "ffn": 256}
LLAMA = PYTHIA | {
    "kv_heads": 2,
    "parallel_residual": False,
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "rotary_fraction": 1.0,
    "init": "normal",
}


def tiny_config(
    model: dict[str, Any] | None = None,
    attention: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    seed: int = 1234,
) -> Config:
    """An fp32 run of a model of 4 layers x 64; each argument overrides a group."""
    return Config(
        seed=seed,
        model=ModelConfig(**(PYTHIA if model is None else model)),
        attention=AttentionConfig(**({"window": 4, "initial_tokens": 2} | (attention or {}))),
        data=DataConfig(sequence_length=LENGTH),
        parallel=ParallelConfig(**(parallel or {})),
        training=TrainingConfig(**({"precision": "fp32", "micro_batch": 2, "global_batch": 8} | (training or {}))),
    )


@dataclass
class MicroBatch:
    """Input of one forward pass: [B, S] tensors and the plan made from `classes` and `document_start`."""

    tokens: Tensor
    labels: Tensor
    classes: Tensor
    document_start: Tensor
    plan: AttentionPlan


def micro_batch(config: Config, seed: int = 0, batch: int = 2, device: torch.device | str = "cpu") -> MicroBatch:
    """Random tokens; a fifth of them are full stops to the attention, and a document starts every 17 tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (batch, LENGTH + 1), generator=generator)
    classes = (torch.rand(batch, LENGTH, generator=generator) < 0.2).to(torch.uint8)
    positions = torch.arange(LENGTH).expand(batch, LENGTH)
    return planned(config, tokens, classes, (positions // 17 * 17).int(), device)


def planned(
    config: Config, tokens: Tensor, classes: Tensor, document_start: Tensor, device: torch.device | str
) -> MicroBatch:
    """The micro-batch of tokens [B, S + 1] on `device`, with the plan of the configuration's pattern."""
    pattern = resolve_pattern(config.attention, config.model.layers)
    classes, document_start = classes.to(device), document_start.to(device)
    return MicroBatch(
        tokens=tokens[:, :-1].to(device).contiguous(),
        labels=tokens[:, 1:].to(device).contiguous(),
        classes=classes,
        document_start=document_start,
        plan=pattern.plan(classes, document_start),
    )

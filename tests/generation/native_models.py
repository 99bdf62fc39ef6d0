"""Tiny models of ours, texts for them, and an oracle of what a bounded cache shows, in plain lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sepllm_train.config.rotary import RotaryScalingConfig
from sepllm_train.config.schema import Config
from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.generation.slots import CachePolicy
from sepllm_train.model.build import build_model
from sepllm_train.model.gpt import SepGPTModel
from sepllm_train.model.pattern import resolve_pattern
from sepllm_train.model.rotary import scaled_frequencies
from tests.model.tiny import LLAMA, PYTHIA, VOCABULARY, tiny_config

END = 7
YARN = RotaryScalingConfig("yarn", factor=4.0, original_max_position_embeddings=24, beta_fast=8.0)
# (model, attention) by what they try out.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pythia": (PYTHIA, {}),
    "llama, grouped queries, norms, sinks": (LLAMA, {"qk_norm": True, "sink": "learned"}),
    "first and last layer full": (PYTHIA, {"full_layers": "first_last"}),
    "tiers with horizons": (
        LLAMA,
        {
            "separators": [
                {"classes": ["period"], "horizon": "forever"},
                {"classes": ["comma"], "horizon": 11},
                {"classes": ["newline"], "horizon": 6},
            ]
        },
    ),
    "fixed interval, sinks": (PYTHIA, {"pattern": "fixed", "interval": 5, "sink": "learned"}),
    "windows": (PYTHIA, {"window": [1, 3, 9, 27]}),
    "streaming": (PYTHIA, {"pattern": "streaming"}),
    "dense": (LLAMA, {"pattern": "dense"}),
    "documents": (PYTHIA, {"separate_documents": True}),
    "yarn": (LLAMA | {"rotary_scaling": YARN}, {}),
    "no rotary embedding": (PYTHIA | {"rotary_fraction": 0.0}, {}),
}


def run_config(name: str, **groups: Any) -> Config:
    """The configuration of one of RUNS."""
    model, attention = RUNS[name]
    return tiny_config(model, attention, **groups)


def trained(config: Config) -> SepGPTModel:
    """A model whose attention matters to its logits. The same in every tensor-parallel layout."""
    model = build_model(config, VOCABULARY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Initial weights are small: scores would all be alike.
            if parameter.dim() == 2 and "layernorm" not in name:
                parameter.mul_(2.0 if config.model.init == "pythia" else 8.0)
            if name.endswith("sink"):
                parameter.copy_(torch.linspace(-1, 2, config.model.heads)[_heads(parameter)])
    return model.eval()


def _heads(parameter: Tensor) -> slice:
    from megatron.core import parallel_state

    first = parallel_state.get_tensor_model_parallel_rank() * len(parameter)
    return slice(first, first + len(parameter))


def token_pattern(config: Config) -> TokenPattern:
    """The run's pattern; every fifth token is a full stop, and there are commas and line breaks."""
    from data_prep.separators import CLASSES

    numbers = {entry.name: entry.number for entry in CLASSES}
    classes = np.zeros(VOCABULARY, dtype=np.uint8)
    classes[0::5] = numbers["period"]
    classes[1::10] = numbers["comma"]
    classes[2::10] = numbers["newline"]
    return TokenPattern.of_run(resolve_pattern(config.attention, config.model.layers), classes, END)


def random_ids(length: int, seed: int = 0) -> list[int]:
    """Token ids without the end-of-document one."""
    drawn = torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
    return [8 if token == END else token for token in drawn.tolist()]


@torch.no_grad()
def full_logits(model: SepGPTModel, pattern: TokenPattern, ids: Sequence[int], vocabulary: int = VOCABULARY) -> Tensor:
    """Logits [S, vocabulary] after every token, by training's own forward under the pattern.

    One pass tells them all: what follows a token does not change them.
    """
    whole = torch.tensor([ids])
    return model(whole, pattern.plan(whole))[0, :, :vocabulary]


@dataclass
class Shown:
    """What a cache holds at each token: `keys[t]` are positions in the text, oldest first, the token's own last."""

    keys: list[list[int]]

    @classmethod
    def of(cls, policy: CachePolicy, separator: Sequence[bool]) -> Shown:
        """By the definition of the four blocks, token by token."""
        held: list[int] = []
        keys = []
        for token in range(len(separator)):
            if policy.capacity is not None and len(held) == policy.capacity:
                near = [key for key in held if key > token - policy.window]
                first = [key for key in held if key < policy.initial and key not in near]
                rest = [key for key in held if key not in near and key not in first and separator[key]]
                newest = rest[-policy.separators :] if policy.separators else []
                held = first + newest + near
            held = [*held, token]
            keys.append(held)
        return cls(keys)


@torch.no_grad()
def oracle_logits(
    model: SepGPTModel,
    config: Config,
    shown: Sequence[Shown],
    ids: Sequence[int],
    pattern: TokenPattern,
    positions: str,
) -> Tensor:
    """Logits [S, VOCABULARY] when layer l attends what shown[l] holds: one softmax after another."""
    rotary = int(config.model.head_dim * config.model.rotary_fraction)

    def turned(x: Tensor, position: int) -> Tensor:
        """x [heads, D] at a position."""
        half = rotary // 2
        plain = 1 / config.model.rotary_base ** (torch.arange(half) * 2 / rotary)
        angle, factor = (
            position * scaled_frequencies(config.model, plain),
            config.model.rotary_scaling.attention_scaling,
        )
        first, second, rest = x[:, :half], x[:, half:rotary], x[:, rotary:]
        cos, sin = factor * angle.cos(), factor * angle.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), 1)

    def forward_of(core: Any, keys_of: Shown) -> Any:
        def forward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
            out = torch.empty_like(query)
            shared = query.shape[2] // key.shape[2]
            for token, held in enumerate(keys_of.keys):
                place = {position: number if positions == "cache" else position for number, position in enumerate(held)}
                asked = turned(query[token, 0], place[token])
                keys = torch.stack([turned(key[at, 0], place[at]) for at in held]).repeat_interleave(shared, 1)
                values = value[held, 0].repeat_interleave(shared, 1)
                scores = torch.einsum("hd,khd->hk", asked, keys) / query.shape[-1] ** 0.5
                if core.sink is not None:
                    scores = torch.cat((scores, core.sink[:, None]), 1)
                weights = scores.softmax(1)[:, : len(held)]
                out[token, 0] = torch.einsum("hk,khd->hd", weights, values)
            return out.flatten(2)

        return forward

    cores = [layer.self_attention.core_attention for layer in model.decoder.layers]
    try:
        for core, keys_of in zip(cores, shown, strict=True):
            core.forward = forward_of(core, keys_of)
        return full_logits(model, pattern, ids)
    finally:
        for core in cores:
            del core.forward

"""GPT-NeoX and Llama written out by hand over a dictionary of weights, to hold the model to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sepllm_train.config.schema import ModelConfig

Weights = dict[str, Tensor]


def separator_mask(separators: Tensor, initial_tokens: int, window: int) -> Tensor:
    """bool [B, S, S] of SepLLM's formula: j <= i and (j < a or separator(j) or i - j < n). separators: [B, S]."""
    position = torch.arange(separators.shape[1])
    distance = position[:, None] - position[None, :]
    kept = separators.bool()[:, None, :] | (position < initial_tokens) | (distance < window)
    return kept & (distance >= 0)


def neox_logits(weights: Weights, model: ModelConfig, tokens: Tensor, visible: list[Tensor]) -> Tensor:
    """GPT-NeoX with parallel residual and exact GELU. tokens [B, S]; visible: bool [B, S, S] per layer; [B, S, V]."""
    x = weights["embedding.word_embeddings.weight"][tokens]
    for layer in range(model.layers):
        p = {n.split(".", 3)[3]: w for n, w in weights.items() if n.startswith(f"decoder.layers.{layer}.")}
        h = _layer_norm(x, p, "input_layernorm")
        q, k, v = _linear(h, p, "self_attention.linear_qkv").unflatten(-1, (model.heads, 3, -1)).unbind(-2)
        attended = _linear(_attend(q, k, v, model, visible[layer]), p, "self_attention.linear_proj")
        h = _layer_norm(x, p, "pre_mlp_layernorm")
        x = x + attended + _linear(F.gelu(_linear(h, p, "mlp.linear_fc1")), p, "mlp.linear_fc2")
    return _layer_norm(x, weights, "decoder.final_layernorm") @ weights["output_layer.weight"].T


def llama_logits(weights: Weights, model: ModelConfig, tokens: Tensor, visible: list[Tensor]) -> Tensor:
    """Llama with grouped-query attention and tied or untied embeddings. Arguments as for `neox_logits`."""
    embedding = weights["embedding.word_embeddings.weight"]
    x = embedding[tokens]
    per_group = model.heads // model.query_groups
    for layer in range(model.layers):
        p = {n.split(".", 3)[3]: w for n, w in weights.items() if n.startswith(f"decoder.layers.{layer}.")}
        h = _rms_norm(x, p["input_layernorm.weight"])
        groups = (h @ p["self_attention.linear_qkv.weight"].T).unflatten(-1, (model.query_groups, per_group + 2, -1))
        q = groups[..., :per_group, :].flatten(-3, -2)
        k, v = (groups[..., i, :].repeat_interleave(per_group, -2) for i in (per_group, per_group + 1))
        x = x + _attend(q, k, v, model, visible[layer]) @ p["self_attention.linear_proj.weight"].T
        gate, up = (_rms_norm(x, p["pre_mlp_layernorm.weight"]) @ p["mlp.linear_fc1.weight"].T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ p["mlp.linear_fc2.weight"].T
    return _rms_norm(x, weights["decoder.final_layernorm.weight"]) @ weights.get("output_layer.weight", embedding).T


def _attend(q: Tensor, k: Tensor, v: Tensor, model: ModelConfig, visible: Tensor) -> Tensor:
    """Softmax attention of [B, S, H, D] tensors after the rotary embedding; gives [B, S, H * D]."""
    scores = torch.einsum("bihd,bjhd->bhij", _rotate(q, model), _rotate(k, model)) * q.shape[-1] ** -0.5
    probabilities = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", probabilities, v).flatten(-2)


def _rotate(x: Tensor, model: ModelConfig) -> Tensor:
    """Rotary position embedding of the first features of [B, S, H, D], in halves."""
    rotary = int(model.head_dim * model.rotary_fraction)
    frequency = model.rotary_base ** -(torch.arange(0, rotary, 2) / rotary)
    angle = (torch.arange(x.shape[1])[:, None] * frequency)[None, :, None, :]
    a, b, rest = x[..., : rotary // 2], x[..., rotary // 2 : rotary], x[..., rotary:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest), -1)


def _layer_norm(x: Tensor, p: Weights, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def _linear(x: Tensor, p: Weights, name: str) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

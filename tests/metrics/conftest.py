"""A plain dense transformer in torch alone: the independent model that counts are held to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepllm_train.config.schema import ModelConfig


def norm_of(model: ModelConfig, size: int) -> nn.Module:
    """The norm that the configuration names."""
    return nn.LayerNorm(size) if model.norm == "layernorm" else nn.RMSNorm(size)


class Block(nn.Module):
    """Attention and MLP, in parallel or one after the other."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        heads, kv_heads, d = model.heads, model.query_groups, model.head_dim
        self.norm1, self.norm2 = norm_of(model, model.hidden), norm_of(model, model.hidden)
        self.qkv = nn.Linear(model.hidden, (heads + 2 * kv_heads) * d, bias=model.bias)
        self.out = nn.Linear(heads * d, model.hidden, bias=model.bias)
        self.up = nn.Linear(model.hidden, model.ffn * (2 if model.activation == "swiglu" else 1), bias=model.bias)
        self.down = nn.Linear(model.ffn, model.hidden, bias=model.bias)

    def attend(self, x: Tensor) -> Tensor:
        """Causal self-attention of x [B, S, hidden]."""
        model = self.model
        heads, kv_heads, d = model.heads, model.query_groups, model.head_dim
        q, k, v = self.qkv(x).split([heads * d, kv_heads * d, kv_heads * d], dim=-1)
        q, k, v = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
        return self.out(out.transpose(1, 2).flatten(2))

    def feed(self, x: Tensor) -> Tensor:
        """The MLP."""
        if self.model.activation == "swiglu":
            gate, value = self.up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * value)
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, hidden] to the same."""
        if self.model.parallel_residual:
            return x + self.attend(self.norm1(x)) + self.feed(self.norm2(x))
        x = x + self.attend(self.norm1(x))
        return x + self.feed(self.norm2(x))


class SmallTransformer(nn.Module):
    """Embeddings, blocks, final norm, LM head."""

    def __init__(self, model: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, model.hidden)
        self.blocks = nn.ModuleList([Block(model) for _ in range(model.layers)])
        self.norm = norm_of(model, model.hidden)
        self.head = nn.Linear(model.hidden, vocabulary, bias=False)
        if model.tied_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean next-token loss of tokens [B, S + 1]."""
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@pytest.fixture
def small_transformer() -> Callable[[ModelConfig, int], nn.Module]:
    """Builds a dense transformer in plain torch from (model, vocabulary)."""
    return SmallTransformer


@pytest.fixture
def random_tokens() -> Callable[[int, int, int], Tensor]:
    """Makes tokens [batch, length + 1] from (vocabulary, batch, length), always the same."""
    generator = torch.Generator().manual_seed(0)
    return lambda vocabulary, batch, length: torch.randint(vocabulary, (batch, length + 1), generator=generator)

"""Norms and transformer layers of the Pythia and the Llama family."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from sepllm_train.attention_pattern import AttentionPattern
from sepllm_train.config.schema import AttentionConfig, ModelConfig
from sepllm_train.model.attention import SeparatorAttention


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm whose gradients are summed over the tensor-parallel group under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark_sequence_parallel(self, config)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose gradients are summed over the tensor-parallel group under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark_sequence_parallel(self, config)


def _mark_sequence_parallel(norm: torch.nn.Module, config: TransformerConfig) -> None:
    """Tell megatron-core that each rank sees a part of the sequence only (`finalize_model_grads` reads this)."""
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


class RowParallelLinearWithBias(RowParallelLinear):
    """Row-parallel linear layer that adds its bias itself.

    megatron-core's MLP asks for the bias apart, for a fused addition; when the MLP is recomputed, autograd would take
    that parameter for a result of the recomputation and follow it in a circle.
    """

    def __init__(self, *args: Any, skip_bias_add: bool, **kwargs: Any) -> None:
        super().__init__(*args, skip_bias_add=False, **kwargs)


class ParallelResidualLayer(TransformerLayer):
    """x + attention(norm1(x)) + mlp(norm2(x)), the block of GPT-NeoX.

    It calls private methods of megatron-core 0.16.1's TransformerLayer, which other versions do not have.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """hidden_states [S, B, hidden] (S / TP under sequence parallelism); gives the same shape and None."""
        attended, context = self._forward_attention(hidden_states, *args, **kwargs)
        normalized = self._forward_pre_mlp_layernorm(hidden_states)
        mlp_output = checkpoint(self.mlp, False, normalized) if self.recompute_mlp else self.mlp(normalized)
        return self._forward_post_mlp(mlp_output, attended), context


def layer_spec(model: ModelConfig, attention: AttentionConfig, pattern: AttentionPattern) -> ModuleSpec:
    """Specification of one transformer layer; the same for every layer of the model."""
    norm = NORMS[model.norm]
    core_attention = ModuleSpec(
        module=SeparatorAttention,
        params={"pattern": pattern, "backend": attention.backend, "sink": attention.sink == "learned"},
    )
    self_attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=core_attention,
            linear_proj=RowParallelLinear,
            q_layernorm=norm if attention.qk_norm else None,
            k_layernorm=norm if attention.qk_norm else None,
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinearWithBias)
    )
    return ModuleSpec(
        module=ParallelResidualLayer if model.parallel_residual else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=self_attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )

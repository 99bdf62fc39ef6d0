"""Norms and transformer layers of the Pythia and the Llama family."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from sepllm_train.config.schema import AttentionConfig, ModelConfig
from sepllm_train.distributed.optional import apex_norm
from sepllm_train.model.attention import SeparatorAttention
from sepllm_train.model.pattern import AttentionPattern
from sepllm_train.model.pointwise import Pointwise
from sepllm_train.model.sequence import DecodeSequence, SeparatorSequence


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
    """Mark for megatron-core that each rank sees a part of the sequence only (`finalize_model_grads` reads this)."""
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


NORMS: dict[str, type[Any]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


def norm_class(norm: str, *, compiled: bool) -> type[Any]:
    """Class of model.norm=`norm`: apex's where there is one, unless norms are compiled together with what is around
    them, which needs torch's own."""
    fused = None if compiled else apex_norm(norm, cuda=torch.cuda.is_available())
    return NORMS[norm] if fused is None else apex_class(fused)


def apex_class(fused: type[Any]) -> type[Any]:
    """One of apex's norms behind the interface of those above."""

    class ApexNorm(fused):
        def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
            super().__init__(hidden_size, eps=eps)
            self.to(config.params_dtype)
            _mark_sequence_parallel(self, config)

    return ApexNorm


class QueryKeyValueLinear(ColumnParallelLinear):
    """The one projection whose bias is not left to what comes after it: the matrix product adds it on the way.

    megatron-core's reads and writes the product once more. Ranks that must exchange something use its forward.
    """

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """input_ [S, B, hidden]; returns [S, B, this rank's features] and None, as the bias is already added."""
        exchange = self.allreduce_dgrad or self.sequence_parallel
        if exchange or self.bias is None or weight is not None:
            return super().forward(input_, weight, runtime_gather_output)
        return F.linear(input_, self.weight, self.bias), None


class MLPProjections(MLP):
    """The two projections of an MLP; the activation between them belongs to `Pointwise`.

    A class rather than a ModuleSpec of MLP: megatron-core 0.19 rewrites such a spec in place and warns about it.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, **_: Any
    ) -> None:
        # Newer versions pass more keywords, which belong to variants of MLP that are not used here.
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
        parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(config, parts, ffn_hidden_size=config.ffn_hidden_size, tp_group=groups.tp)


class SeparatorLayer(TransformerLayer):
    """x + attention(norm(x)), then the same with the MLP: the block of Llama.

    Takes the parts of megatron-core's layer (dropout is never used) and computes what is between them by `pointwise`.
    """

    def __init__(self, *args: Any, pointwise: Pointwise, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pointwise = pointwise

    def forward(
        self,
        hidden_states: Tensor,
        *,
        packed_seq_params: SeparatorSequence,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [S, B, hidden] (S / TP under sequence parallelism); gives the same shape and None."""
        return _viewless(self._block(hidden_states, packed_seq_params)), None

    def decode(self, x: Tensor, sequence: DecodeSequence) -> Tensor:
        """As `forward`, for tokens [N, B, hidden] that are appended to a cache; nothing is kept for gradients."""
        return self._block(x, sequence)

    def _block(self, x: Tensor, sequence: SeparatorSequence) -> Tensor:
        attended, bias = self._attend(self.pointwise.norm(x, self.input_layernorm), sequence)
        x, normalized = self.pointwise.add_and_norm(x, attended, bias, self.pre_mlp_layernorm)
        return self.pointwise.add(x, self._mlp(normalized), self.mlp.linear_fc2.bias)

    def _attend(self, normalized: Tensor, sequence: SeparatorSequence) -> tuple[Tensor, Tensor | None]:
        """Result of attention, and the bias that is to be added to it. Core attention rotates queries and keys."""
        if isinstance(sequence, DecodeSequence):
            # What megatron-core's forward does around these three takes longer than they do for one token.
            attention = self.self_attention
            parts = attention.get_query_key_value_tensors(normalized)
            return project(attention.linear_proj, attention.core_attention.forward(*parts, None, None, None, sequence))
        return self.self_attention(normalized, attention_mask=None, rotary_pos_emb=None, packed_seq_params=sequence)

    def _mlp(self, normalized: Tensor) -> Tensor:
        """Result of the MLP without its last bias.

        The bias stays outside of recomputation: autograd would take a parameter that comes out of it for a result and
        follow it in a circle.
        """
        return checkpoint(self._mlp_forward, False, normalized) if self.recompute_mlp else self._mlp_forward(normalized)

    def _mlp_forward(self, normalized: Tensor) -> Tensor:
        inner = self.pointwise.activation(*project(self.mlp.linear_fc1, normalized))
        return project(self.mlp.linear_fc2, inner)[0]


class ParallelResidualLayer(SeparatorLayer):
    """x + attention(norm1(x)) + mlp(norm2(x)), the block of GPT-NeoX."""

    def _block(self, x: Tensor, sequence: SeparatorSequence) -> Tensor:
        first, second = self.pointwise.two_norms(x, self.input_layernorm, self.pre_mlp_layernorm)
        attended, bias = self._attend(first, sequence)
        return self.pointwise.add_both(x, attended, bias, self._mlp(second), self.mlp.linear_fc2.bias)


def project(linear: Any, x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Output of a parallel linear whose bias is left to what comes after it, and that bias.

    weight: in place of the linear's own. Without gradients and other ranks the matrix product is all there is to do;
    megatron-core's ways to and from other ranks cost more than that of one token.
    """
    if torch.is_grad_enabled() or linear.config.tensor_model_parallel_size > 1:
        return linear(x) if weight is None else linear(x, weight=weight)
    return F.linear(x, linear.weight if weight is None else weight), linear.bias


def _viewless(x: Tensor) -> Tensor:
    """x as a tensor that is no view: megatron-core's recomputation refuses to keep views."""
    return make_viewless_tensor(x, requires_grad=x.requires_grad, keep_graph=True)


def layer_spec(
    model: ModelConfig, attention: AttentionConfig, pattern: AttentionPattern, pointwise: Pointwise
) -> ModuleSpec:
    """Specification of one transformer layer; the same for every layer of the model."""
    norm = norm_class(model.norm, compiled=pointwise.compiled)
    core_attention = ModuleSpec(
        module=SeparatorAttention,
        params={
            "pattern": pattern,
            "backend": attention.backend,
            "sink": attention.sink == "learned",
            "pointwise": pointwise,
        },
    )
    self_attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=QueryKeyValueLinear,
            core_attention=core_attention,
            linear_proj=RowParallelLinear,
            q_layernorm=norm if attention.qk_norm else None,
            k_layernorm=norm if attention.qk_norm else None,
        ),
    )
    return ModuleSpec(
        module=ParallelResidualLayer if model.parallel_residual else SeparatorLayer,
        params={"pointwise": pointwise},
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=self_attention,
            pre_mlp_layernorm=norm,
            mlp=MLPProjections,
        ),
    )

"""Core attention of a layer: sep_attention with the layer's window and horizons."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide, get_pg_size
from sep_attention import AttentionPlan, sep_attention
from torch import Tensor

from sepllm_train.distributed.context import ContextPlan, fetch_keys
from sepllm_train.model.pattern import AttentionPattern
from sepllm_train.model.pointwise import Pointwise
from sepllm_train.model.sequence import DecodeSequence, SeparatorSequence


class SeparatorAttention(MegatronModule):
    """Attention of the heads of this tensor-parallel rank, under megatron-core's core-attention interface.

    `pattern` and `sink` (one learned logit per head in the softmax denominator) come from the module spec. The layer
    finds its window by `layer_number`, which counts from 1 over the whole model, also under pipeline parallelism.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        pattern: AttentionPattern,
        backend: str,
        sink: bool,
        pointwise: Pointwise,
    ) -> None:
        super().__init__(config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
        self.tp_group = groups.tp
        self.number = layer_number - 1
        self.layer = pattern.layers[self.number]
        self.backend = backend
        self.scale = softmax_scale
        self.pointwise = pointwise
        self.sink: torch.nn.Parameter | None = None
        if sink:
            heads = divide(config.num_attention_heads, get_pg_size(self.tp_group))
            self.sink = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.sink, True, 0, 1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: SeparatorSequence | None = None,
    ) -> Tensor:
        """Attend. query [S, B, H, D], key and value [S, B, Hkv, D] of this rank's heads; gives [S, B, H * D].

        S is the whole sequence, also under sequence parallelism; under context parallelism it is this rank's part.
        Mask and bias are megatron-core's and unused: `packed_seq_params` carries the plan, which has what is visible,
        and the rotation of queries and keys. A DecodeSequence brings the cache that attends in their place.
        """
        assert packed_seq_params is not None, "the model was called without an attention plan"
        if isinstance(packed_seq_params, DecodeSequence):
            cache = packed_seq_params.cache
            return cache.attend(self.number, query, key, value, scale=self.scale, sink=self.sink)
        plan = packed_seq_params.plan
        query, key = self.rotated(query, key, packed_seq_params)
        if isinstance(plan, ContextPlan):
            fetched = fetch_keys(key, value, plan.exchange(self.layer.reach), plan.group)
            out = torch.cat(
                [
                    self._attend(queries, k, v, chunk.plan)
                    for queries, (chunk, k, v) in zip(query.chunk(2), fetched, strict=True)
                ]
            )
        else:
            out = self._attend(query, key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), plan)
        return out.flatten(2)

    def rotated(self, query: Tensor, key: Tensor, sequence: SeparatorSequence) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are compared: with the rotary embedding of their positions, if there is one."""
        return (query, key) if sequence.rotation is None else self.pointwise.rotate(query, key, *sequence.rotation)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        """[Q, B, H, D] queries, the last of the sequences behind key and value [B, Hkv, S, D]; gives [Q, B, H, D]."""
        out = sep_attention(
            query.permute(1, 2, 0, 3),
            key,
            value,
            plan,
            window=self.layer.window,
            horizons=self.layer.horizons,
            sink=self.sink,
            scale=self.scale,
            backend=self.backend,
        )
        return out.permute(2, 0, 1, 3)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The sinks as a distributed checkpoint stores them: split over heads. `metadata` as megatron-core gives it."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"sink": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )

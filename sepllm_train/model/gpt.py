"""The model class: megatron-core's GPT called with an attention plan, its padded vocabulary out of the softmax."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.utils import get_pg_rank
from sep_attention import AttentionPlan
from torch import Tensor

from sepllm_train.distributed.context import ContextPlan
from sepllm_train.model.loss import OutputShard, output_cross_entropy
from sepllm_train.model.pointwise import Pointwise
from sepllm_train.model.sequence import DecodeSequence, SeparatorSequence


class SepGPTModel(GPTModel):
    """GPT whose layers attend by an AttentionPlan.

    `vocabulary` counts the real entries; rows from there to the padded `vocab_size` have probability zero.
    `loss_chunk`: tokens whose logits exist at once when there are labels; 0 = all.
    """

    def __init__(self, *args: Any, vocabulary: int, loss_chunk: int, pointwise: Pointwise, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.vocabulary = vocabulary
        self.loss_chunk = loss_chunk
        self.pointwise = pointwise

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        plan: AttentionPlan | ContextPlan,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Run this pipeline stage.

        tokens, position_ids, labels: i64 [B, S]; plan: of the same micro-batch, on the same device. Every pipeline
        stage needs the plan; only the first reads tokens and only the last labels. Positions are those of the sequence
        (the rotary embedding counts them itself, across documents). Under context parallelism S is this rank's part
        of the sequences, and the plan a ContextPlan.

        Gives the loss of each token in nats, fp32 [B, S], on the last stage; without labels the logits
        [B, S, padded vocabulary / TP] of this rank, -inf where there is no entry; hidden states on other stages.
        """
        output = super().forward(
            tokens, position_ids, None, labels=labels, packed_seq_params=SeparatorSequence.of(plan)
        )
        return self._mask_padding(output) if self.post_process and labels is None else output

    def next_token_logits(self, tokens: Tensor, sequence: DecodeSequence) -> Tensor:
        """Logits [B, vocabulary] of the token after the last one of each row, the same on all tensor-parallel ranks.

        tokens: i64 [B, N], which `sequence.cache` appends and attends for. Without pipeline or sequence parallelism.
        """
        logits = super().forward(tokens, None, None, packed_seq_params=sequence)[:, -1]
        return gather_from_tensor_model_parallel_region(logits, group=self.tp_group)[:, : self.vocabulary]

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy over the real entries. labels [B, S], logits [S, B, padded vocabulary / TP]; gives [B, S]."""
        return super().compute_language_model_loss(labels, self._mask_padding(logits))

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """What megatron-core's forward ends with: the output layer and the loss. hidden_states [S, B, hidden]."""
        if isinstance(kwargs.get("packed_seq_params"), DecodeSequence):
            hidden_states = hidden_states[-1:]
        if not (self.post_process and (self.loss_chunk or self.pointwise.compiled)) or labels is None:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **kwargs)
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=self.tp_group)
        shard = OutputShard(len(weight), self.vocabulary, self.loss_chunk, self.tp_group, self.pointwise)
        loss = output_cross_entropy(hidden.flatten(0, 1), weight, labels.t().flatten(), shard)
        return loss.view(hidden.shape[:2]).t().contiguous()

    def _mask_padding(self, logits: Tensor) -> Tensor:
        """Set the logits of entries that do not exist to -inf, in place; last axis is this rank's shard."""
        shard = logits.shape[-1]
        real = max(0, self.vocabulary - get_pg_rank(self.tp_group) * shard)
        if real < shard:
            logits[..., real:] = float("-inf")
        return logits

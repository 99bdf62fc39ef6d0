"""The model class: embedding, transformer block and output layer of megatron-core, called with an attention plan."""

from __future__ import annotations

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank
from sep_attention import AttentionPlan
from torch import Tensor

from sepllm_train.config.schema import ModelConfig
from sepllm_train.distributed.context import ContextPlan, part_of
from sepllm_train.model.layers import project
from sepllm_train.model.loss import OutputShard, output_cross_entropy
from sepllm_train.model.pointwise import Pointwise
from sepllm_train.model.rotary import scaled_frequencies
from sepllm_train.model.sequence import DecodeSequence, SeparatorSequence


class SepGPTModel(LanguageModule):
    """One pipeline stage, or one chunk of it, of a GPT whose layers attend by an AttentionPlan.

    Built from megatron-core's parts and not from its GPTModel, which is deprecated from 0.19 on. The names of the parts
    are those of a GPTModel, because they are the keys of checkpoints.

    layers: specification of this chunk's layers and final norm. vocab_size: rows of the embedding and the output layer
    over all tensor-parallel ranks, of which the first `vocabulary` are real entries; the others get probability zero.
    loss_chunk: tokens whose logits exist at once when there are labels; 0 = all. pre_process, post_process: whether
    this chunk holds the embedding and the output layer. vp_stage: number of the chunk under the interleaved schedule.
    """

    # Read by megatron-core's schedules: one hidden state travels between stages.
    model_type = ModelType.encoder_or_decoder

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        layers: TransformerBlockSubmodules,
        *,
        vocab_size: int,
        vocabulary: int,
        loss_chunk: int,
        pointwise: Pointwise,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config)
        self.vocab_size = vocab_size
        self.vocabulary = vocabulary
        self.loss_chunk = loss_chunk
        self.pointwise = pointwise
        # Read by megatron-core for tied embeddings, gradient reduction and checkpoints.
        self.pre_process = pre_process
        self.post_process = post_process
        self.share_embeddings_and_output_weights = model.tied_embeddings
        self.vp_stage = vp_stage
        self.rotary_pos_emb: RotaryEmbedding | None = None
        if model.rotary_fraction > 0:
            self.rotary_pos_emb = RotaryEmbedding(
                config.kv_channels,
                model.rotary_fraction,
                rotary_base=model.rotary_theta,
                use_cpu_initialization=True,
                cp_group=self.cp_group,
            )
            self.rotary_pos_emb.inv_freq = scaled_frequencies(model, self.rotary_pos_emb.inv_freq)
        self._rotary_factor = model.rotary_scaling.attention_scaling
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config, vocab_size, max_sequence_length=0, position_embedding_type="none", tp_group=self.tp_group
            )
        self.decoder = TransformerBlock(
            config,
            layers,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_weight_param_allocation=pre_process and model.tied_embeddings,
                tp_group=self.tp_group,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """Take the hidden states [S, B, hidden] of the previous stage; called by megatron-core's schedules."""
        (hidden,) = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        self.decoder.set_input_tensor(hidden)

    def forward(
        self,
        tokens: Tensor,
        plan: AttentionPlan | ContextPlan,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Run this pipeline stage.

        tokens, labels: i64 [B, S]; plan: of the same micro-batch, on the same device; positions: i64 [B, S], those of
        the rotary embedding, each below the length of the sequences; None counts from the start of the sequence,
        across documents. Every pipeline stage needs plan and positions; only the first reads tokens and only the last
        labels. Under context parallelism S is this rank's part of the sequences, and the plan a ContextPlan.

        Returns the loss of each token in nats, fp32 [B, S], on the last stage; without labels the logits
        [B, S, padded vocabulary / TP] of this rank, -inf where there is no entry; hidden states on other stages.
        """
        hidden = self._hidden_states(tokens, SeparatorSequence.of(plan, self._rotation(plan, positions)))
        if not self.post_process:
            return hidden
        if labels is not None and (self.loss_chunk or self.pointwise.compiled):
            return self._chunked_loss(hidden, labels)
        logits = self._logits(hidden)
        if labels is not None:
            return self.compute_language_model_loss(labels, logits)
        return logits.transpose(0, 1).contiguous()

    def next_token_logits(self, tokens: Tensor, sequence: DecodeSequence) -> Tensor:
        """Logits [B, vocabulary] of the token after the last one of each row, the same on all tensor-parallel ranks.

        tokens: i64 [B, N], which `sequence.cache` appends and attends for. Without pipeline or sequence parallelism.
        """
        hidden = self.embedding(tokens, None)
        for layer in self.decoder.layers:
            hidden = layer.decode(hidden, sequence)
        logits = self._logits(self.decoder.final_layernorm(hidden[-1:]))[0]
        return gather_from_tensor_model_parallel_region(logits, group=self.tp_group)[:, : self.vocabulary]

    def _rotation(self, plan: AttentionPlan | ContextPlan, positions: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the rotary embedding for this rank's tokens, [S, 1, 1, R], or [S, B, 1, R] with
        `positions`; None without one.

        Taken once for all layers: megatron-core's attention would take them in each, for queries and for keys.
        """
        if self.rotary_pos_emb is None:
            return None
        angles = self.rotary_pos_emb.get_emb(plan.sequence_length)
        if positions is not None:
            angles = angles[:, 0][positions.t()]
        elif isinstance(plan, ContextPlan):
            angles = part_of(angles[None], plan.group.rank, plan.group.size)[0]
        return self.rotation_by(angles)

    def rotation_by(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `angles`, fp32 in radians of any shape, in the precision of the weights, with the factor
        that YaRN gives them."""
        cos, sin = angles.cos(), angles.sin()
        if self._rotary_factor != 1:
            cos, sin = cos * self._rotary_factor, sin * self._rotary_factor
        return cos.to(self.config.params_dtype), sin.to(self.config.params_dtype)

    def _hidden_states(self, tokens: Tensor, sequence: SeparatorSequence) -> Tensor:
        """Hidden states [S, B, hidden] after this chunk's layers (S / TP under sequence parallelism)."""
        # On a later stage the decoder starts from what `set_input_tensor` was given.
        embedded = self.embedding(tokens, None) if self.pre_process else None
        return self.decoder(embedded, None, packed_seq_params=sequence)

    def _tied_weight(self) -> Tensor | None:
        """The embedding when it is the output layer's weight too; None when that has its own."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits [S, B, padded vocabulary / TP] of this rank, -inf where there is no entry."""
        logits, _ = project(self.output_layer, hidden, self._tied_weight())
        shard = logits.shape[-1]
        real = max(0, self.vocabulary - get_pg_rank(self.tp_group) * shard)
        if real < shard:
            logits[..., real:] = float("-inf")
        return logits

    def _chunked_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Loss of each token, fp32 [B, S], without an fp32 copy of all logits."""
        tied = self._tied_weight()
        weight = self.output_layer.weight if tied is None else tied
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        shard = OutputShard(len(weight), self.vocabulary, self.loss_chunk, self.tp_group, self.pointwise)
        loss = output_cross_entropy(hidden.flatten(0, 1), weight, labels.t().flatten(), shard)
        return loss.view(hidden.shape[:2]).t().contiguous()

"""How an attention plan travels through megatron-core's layers."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams
from sep_attention import AttentionPlan

from sepllm_train.distributed.context import ContextPlan


@dataclass(kw_only=True)
class SeparatorSequence(PackedSeqParams):
    """A micro-batch's attention plan as packed-sequence parameters, the one argument all layers hand on untouched.

    The sequences are not packed in megatron-core's sense: the format stays `sbhd`.
    """

    plan: AttentionPlan | ContextPlan

    @classmethod
    def of(cls, plan: AttentionPlan | ContextPlan) -> SeparatorSequence:
        """Wrap the plan of B sequences of S tokens. S is set because the rotary embedding reads it from here, and cuts
        out the part of a context-parallel rank itself."""
        length = plan.sequence_length
        return cls(qkv_format="sbhd", max_seqlen_q=length, max_seqlen_kv=length, plan=plan)

"""How an attention plan travels through megatron-core's layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from sep_attention import AttentionPlan
from torch import Tensor

from sepllm_train.distributed.context import ContextPlan


@dataclass(kw_only=True)
class SeparatorSequence(PackedSeqParams):
    """A micro-batch's attention plan as packed-sequence parameters, the one argument all layers hand on untouched.

    The sequences are not packed in megatron-core's sense: the format stays `sbhd`.
    """

    plan: AttentionPlan | ContextPlan
    # Cosines and sines [S, 1, 1, R] of the rotary embedding's R features; None where nothing is rotated.
    rotation: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, plan: AttentionPlan | ContextPlan) -> SeparatorSequence:
        """Wrap the plan of B sequences of S tokens. S is set because the rotary embedding reads it from here, and cuts
        out the part of a context-parallel rank itself."""
        length = plan.sequence_length
        return cls(qkv_format="sbhd", max_seqlen_q=length, max_seqlen_kv=length, plan=plan)

    def rotate_by(self, angles: Tensor | None, dtype: torch.dtype) -> None:
        """Let core attention rotate queries and keys by `angles` [S, 1, 1, R]; the layers after the first find it done.

        megatron-core's attention would take the cosines anew in each layer, for queries and for keys.
        """
        if angles is not None and self.rotation is None:
            self.rotation = (angles.cos().to(dtype), angles.sin().to(dtype))

"""How an attention plan travels through megatron-core's layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

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


class KeyCache(Protocol):
    """What attends in the place of a plan when text is generated."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, sink: Tensor | None
    ) -> Tensor:
        """Take the keys and values [N, B, Hkv, D] of N new tokens in layer `layer`, counted from 0, and attend with
        their queries [N, B, H, D], none of them rotated yet; gives [N, B, H * D]."""


@dataclass(kw_only=True)
class DecodeSequence(SeparatorSequence):
    """Tokens that are appended to a cache, which knows what they see: there is no plan."""

    plan: Any = None
    cache: KeyCache

    @classmethod
    def of_cache(cls, cache: KeyCache) -> DecodeSequence:
        """Wrap a cache that has been told which tokens come. One angle is all that megatron-core has to compute."""
        return cls(qkv_format="sbhd", max_seqlen_q=1, max_seqlen_kv=1, cache=cache)

    def rotate_by(self, angles: Tensor | None, dtype: torch.dtype) -> None:
        """Nothing: the cache rotates, since it knows the positions."""

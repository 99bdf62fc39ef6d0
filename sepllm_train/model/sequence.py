"""Carriers of an attention plan through megatron-core's layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

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
    # Cosines and sines [S, 1, 1, R] of the rotary embedding's R features, [S, B, 1, R] where positions differ between
    # the sequences; None where nothing is rotated.
    rotation: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, plan: AttentionPlan | ContextPlan, rotation: tuple[Tensor, Tensor] | None = None) -> SeparatorSequence:
        """Wrap the plan of B sequences, and the rotation of this rank's positions."""
        return cls(qkv_format="sbhd", plan=plan, rotation=rotation)


class KeyCache(Protocol):
    """Cache that attends in the place of a plan when text is generated."""

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
        """Wrap a cache that has the classes of the next tokens. It rotates by itself, since it knows the positions."""
        return cls(qkv_format="sbhd", cache=cache)

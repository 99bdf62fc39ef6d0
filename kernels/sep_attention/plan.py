"""The attention plan: where the special tokens of a micro-batch are, built once and shared by all layers.

Shape letters: B sequences, S tokens, T tiers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sep_attention.triton.tuning import TRITON_INSTALLED

FOREVER: int = 2**30
MAX_TIERS = 4


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Tier of every token and, per tier, sorted positions and prefix counts.

    Tier 0 holds the ordinary tokens, tiers 1..T those that stay visible up to their tier's horizon.

    Attributes:
        tier: u8 [B, S], 0..T.
        prefix: i32 [T, B, S+1]; prefix[t-1, b, i] counts the tokens of tier t at positions below i.
        positions: i32 [T, B, S]; ascending positions of each tier's tokens, padded with zeros.
        document_start: i32 [B, S], position of the first token of each token's document, or None when the
            sequence is one document. It never decreases along a sequence: documents are contiguous.
        derived: masks and block layouts that backends worked out from this plan, so that layers share them.

    Raises ValueError when shapes, dtypes or devices disagree. Contents are not read: that would stall a GPU.
    """

    tier: Tensor
    prefix: Tensor
    positions: Tensor
    document_start: Tensor | None = None
    derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.tier.dim() != 2 or self.tier.shape[1] < 1:
            raise ValueError(f"plan.tier must be [B, S] with S >= 1, got {list(self.tier.shape)}")
        batch, length = self.tier.shape
        tiers = self.prefix.shape[0]
        _check_tensor("tier", self.tier, torch.uint8, [batch, length], self.tier)
        _check_tensor("prefix", self.prefix, torch.int32, [tiers, batch, length + 1], self.tier)
        _check_tensor("positions", self.positions, torch.int32, [tiers, batch, length], self.tier)
        if self.document_start is not None:
            _check_tensor("document_start", self.document_start, torch.int32, [batch, length], self.tier)

    @property
    def num_tiers(self) -> int:
        """T, the number of tiers above the ordinary one."""
        return self.prefix.shape[0]

    @property
    def batch_size(self) -> int:
        """B, the number of sequences."""
        return self.tier.shape[0]

    @property
    def sequence_length(self) -> int:
        """S, the number of tokens of each sequence."""
        return self.tier.shape[1]

    def to(self, device: torch.device | str) -> AttentionPlan:
        """The same plan on `device` (itself when it is there already)."""
        target = torch.device(device)
        if self.tier.device == target:
            return self
        tier, prefix, positions = (x.to(target, non_blocking=True) for x in (self.tier, self.prefix, self.positions))
        starts = None if self.document_start is None else self.document_start.to(target, non_blocking=True)
        return AttentionPlan(tier, prefix, positions, document_start=starts)


def build_plan(
    tier: Tensor, *, initial_tokens: int = 0, document_start: Tensor | None = None, num_tiers: int = 1
) -> AttentionPlan:
    """Builds the plan of a micro-batch without a host sync.

    Args:
        tier: u8 or bool [B, S]; the tier of each token, 0 for ordinary ones. Bool means one tier.
        initial_tokens: positions 0..initial_tokens-1 of the sequence, or of each document when `document_start`
            is given, join tier 1 (by convention the one with an infinite horizon).
        document_start: integers [B, S], position of the first token of each token's document; None for one document.
        num_tiers: T, 1..4; tiers no token is in are allowed.

    Raises ValueError for wrong shapes, dtypes or counts, and on CPU for a tier above `num_tiers`.
    """
    if tier.dtype not in (torch.uint8, torch.bool):
        raise ValueError(f"tier must be uint8 or bool, got {tier.dtype}")
    if tier.dim() != 2 or tier.shape[1] < 1:
        raise ValueError(f"tier must be [B, S] with S >= 1, got {list(tier.shape)}")
    if not 1 <= num_tiers <= MAX_TIERS:
        raise ValueError(f"num_tiers must be 1..{MAX_TIERS}, got {num_tiers}")
    if initial_tokens < 0:
        raise ValueError(f"initial_tokens must be at least 0, got {initial_tokens}")
    tier = tier.to(torch.uint8)
    if document_start is not None:
        if document_start.shape != tier.shape or document_start.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"document_start must be int32 or int64 {list(tier.shape)}, "
                f"got {document_start.dtype} {list(document_start.shape)}"
            )
        if document_start.device != tier.device:
            raise ValueError(f"document_start is on {document_start.device} but tier is on {tier.device}")
        document_start = document_start.to(torch.int32)
    make = _plan_op if is_traced(tier) else _plan_tensors
    tier, prefix, positions, *document_end = make(tier, initial_tokens, document_start, num_tiers)
    plan = AttentionPlan(tier, prefix, positions, document_start=document_start)
    if document_end:
        plan.derived["document_end"] = document_end[0]
    return plan


def is_traced(tensor: Tensor) -> bool:
    """True under torch.compile and for tensors that only stand for others: both know no function but registered ops."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


def _plan_tensors(tier: Tensor, initial_tokens: int, document_start: Tensor | None, num_tiers: int) -> list[Tensor]:
    """Tier, prefix and positions of a plan; where Triton makes them of separate documents, `document_end` too."""
    if tier.is_cuda and TRITON_INSTALLED:
        # Imported on use: Triton is optional.
        from sep_attention.triton.plan import plan_tensors

        made = plan_tensors(tier, initial_tokens, document_start, num_tiers)
        return [tensor for tensor in made if tensor is not None]
    length = tier.shape[1]
    position = torch.arange(length, device=tier.device, dtype=torch.int32)
    offset = position if document_start is None else position - document_start
    tier = torch.where(offset < initial_tokens, torch.ones_like(tier), tier)
    if tier.device.type == "cpu" and tier.numel() and int(tier.max()) > num_tiers:
        raise ValueError(f"tier holds {int(tier.max())} but num_tiers is {num_tiers}")

    numbers = torch.arange(1, num_tiers + 1, device=tier.device, dtype=torch.uint8)
    member = tier == numbers[:, None, None]  # [T, B, S]
    prefix = torch.zeros(num_tiers, *tier.shape[:1], length + 1, device=tier.device, dtype=torch.int32)
    torch.cumsum(member, -1, dtype=torch.int32, out=prefix[..., 1:])
    before = prefix[..., :-1]
    # Members go to the front in order, the others to the back in reverse: a permutation, so the scatter has no
    # duplicate index and is deterministic on every device.
    slot = torch.where(member, before, length - 1 - position + before)
    positions = torch.zeros_like(before, memory_format=torch.contiguous_format)
    positions.scatter_(-1, slot.long(), member * position)
    return [tier, prefix, positions]


_plan_op = torch.library.custom_op(
    "sep_attention::plan",
    _plan_tensors,
    mutates_args=(),
    schema="(Tensor tier, int initial_tokens, Tensor? document_start, int num_tiers) -> Tensor[]",
)


@_plan_op.register_fake
def _(tier: Tensor, initial_tokens: int, document_start: Tensor | None, num_tiers: int) -> list[Tensor]:
    batch, length = tier.shape
    shapes: list[tuple[int, ...]] = [(num_tiers, batch, length + 1), (num_tiers, batch, length)]
    if tier.device.type == "cuda" and TRITON_INSTALLED and document_start is not None:
        shapes.append((batch, length))
    return [tier.new_empty(tier.shape), *(tier.new_empty(shape, dtype=torch.int32) for shape in shapes)]


def effective_reach(plan: AttentionPlan, window: int, horizons: Sequence[int] | None) -> list[int]:
    """max(window, horizon) of tiers 1..T, after checking the layer's window and horizons against the plan.

    Raises ValueError for a window or horizon below 1 or a count of horizons other than the plan's T.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be a whole number of at least 1 (it counts the token itself), got {window!r}")
    if horizons is None:
        return [max(window, FOREVER)] * plan.num_tiers
    if len(horizons) != plan.num_tiers:
        raise ValueError(f"the plan has {plan.num_tiers} tiers but {len(horizons)} horizons were given")
    for horizon in horizons:
        if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
            raise ValueError(f"a horizon must be a whole number of at least 1, got {horizon!r}")
    return [max(window, horizon) for horizon in horizons]


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: list[int], tier: Tensor) -> None:
    if tensor.dtype != dtype or list(tensor.shape) != shape:
        raise ValueError(f"plan.{name} must be {dtype} {shape}, got {tensor.dtype} {list(tensor.shape)}")
    if tensor.device != tier.device:
        raise ValueError(f"plan.{name} is on {tensor.device} but plan.tier is on {tier.device}")

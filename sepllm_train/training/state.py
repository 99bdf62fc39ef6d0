"""Counters of a run, carried through checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class TrainState:
    """Progress of a run. `seconds` is wall-clock of training steps alone; `pairs` are visible (query, key) pairs
    summed over sequences and layers, from which the FLOPs follow, and `finished_pairs` those of each phase of a
    curriculum that is over. `bad_steps` were skipped for their loss or gradients, `bad_in_a_row` of them just now, and
    `overflows` for fp16's loss scale; `recent_norms` are the gradient norms of the last good steps."""

    step: int = 0
    tokens: int = 0
    pairs: int = 0
    finished_pairs: list[int] = field(default_factory=list)
    seconds: float = 0.0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    overflows: int = 0
    recent_norms: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """The inverse of `to_dict`; what was written before a counter was there has none of it."""
        values = {"finished_pairs": [], "overflows": 0, **values}
        return cls(**{field.name: values[field.name] for field in fields(cls)})

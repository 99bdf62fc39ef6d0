"""Ranks that decide together, so that a mistake that one of them finds ends all with its sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from sepllm_train.base.errors import UserError

T = TypeVar("T")


def together(action: Callable[[], T]) -> T:
    """Run `action` on every rank and wait for all; a UserError of any rank is raised on all of them.

    `action` must not communicate: a rank that fails inside it would leave the others waiting.
    """
    result: T | None = None
    message: str | None = None
    try:
        result = action()
    except UserError as error:
        message = str(error)
    for rank, found in enumerate(_gather(message)):
        if found is not None:
            raise UserError(found if rank == 0 else f"{found} (found by rank {rank})")
    return result  # type: ignore[return-value]


def agree(value: Any, complaint: str) -> None:
    """Raise UserError with `complaint` on every rank unless all of them hold the same `value`."""
    if any(other != value for other in _gather(value)):
        raise UserError(complaint)


def _gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values

"""Agreement between ranks: a mistake that one of them finds ends all with its message; and errors of collectives."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from sepllm_train.base.errors import LostRank, UserError

T = TypeVar("T")

# gloo has no exception of its own. Its words when the peer has ended, and when it does not answer.
_GONE = r"Connection (closed|reset) by peer|Broken pipe|Socket closed|pair closure|Connection refused"
_LATE = r"Timed out waiting|[Tt]imed out after|wait timeout"


def on_all_ranks(action: Callable[[], T]) -> T:
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


def require_equal(value: Any, complaint: str) -> None:
    """Raise UserError with `complaint` on every rank unless all of them hold the same `value`."""
    if any(other != value for other in _gather(value)):
        raise UserError(complaint)


def _gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def lost_rank(error: RuntimeError, timeout_seconds: float) -> LostRank | None:
    """Error with a message for users for an error of a collective; None for any other."""
    text = str(error)
    if re.search(_LATE, text):
        return LostRank(
            f"another process of the run did not answer within parallel.timeout_seconds={timeout_seconds:g}: it hangs, "
            "or its machine cannot be reached. The same command continues from the newest checkpoint."
        )
    if isinstance(error, dist.DistError) or re.search(_GONE, text):
        return LostRank(
            f"another process of the run has ended or cannot be reached ({short(text)}): its own output says why. The "
            "same command continues from the newest checkpoint."
        )
    return None


def not_all_arrived(error: RuntimeError, world_size: int, timeout_seconds: float) -> LostRank:
    """Error with a message for users for a failed start of torch.distributed."""
    return LostRank(
        f"not all of the {world_size} processes came together within parallel.timeout_seconds={timeout_seconds:g} "
        f"({short(str(error))}): start all of them, with a MASTER_ADDR and MASTER_PORT that each can reach."
    )


def short(text: str) -> str:
    """First sentence of torch's message, without source places and stacks."""
    first = text.strip().splitlines()[0] if text.strip() else "no reason given"
    return re.sub(r"^\[[^\]]*\.cc:\d+\] ", "", first).split(". ")[0].rstrip(".")

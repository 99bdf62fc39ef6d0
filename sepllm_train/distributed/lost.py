"""What torch.distributed says when another process is gone or late, in a sentence."""

from __future__ import annotations

import re

import torch.distributed as dist

from sepllm_train.base.errors import LostRank

# gloo has no exception of its own. Its words when the peer has ended, and when it does not answer.
_GONE = r"Connection (closed|reset) by peer|Broken pipe|Socket closed|pair closure|Connection refused"
_LATE = r"Timed out waiting|[Tt]imed out after|wait timeout"


def lost_rank(error: RuntimeError, timeout_seconds: float) -> LostRank | None:
    """The sentence for an error of a collective, or None when it is another error."""
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
    """The sentence for an error of the start of torch.distributed."""
    return LostRank(
        f"not all of the {world_size} processes came together within parallel.timeout_seconds={timeout_seconds:g} "
        f"({short(str(error))}): start all of them, with a MASTER_ADDR and MASTER_PORT that each can reach."
    )


def short(text: str) -> str:
    """The first sentence of torch's message, without source places and stacks."""
    first = text.strip().splitlines()[0] if text.strip() else "no reason given"
    return re.sub(r"^\[[^\]]*\.cc:\d+\] ", "", first).split(". ")[0].rstrip(".")

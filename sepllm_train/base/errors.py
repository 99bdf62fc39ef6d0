"""Errors that end a program: one sentence, printed once, and an exit code that a script can act on."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable

from sepllm_train.base.quiet import mute

__all__ = [
    "EXIT_BAD_STEPS",
    "EXIT_INTERRUPTED",
    "EXIT_LOST_RANK",
    "EXIT_USER_ERROR",
    "BadSteps",
    "Interrupted",
    "LostRank",
    "RankError",
    "RunStopped",
    "UserError",
    "exit_on_user_error",
    "first_line",
    "report",
]

EXIT_USER_ERROR = 2
# Loss or gradients were unusable too many steps in a row or in all steps, or the last validation loss is not finite.
EXIT_BAD_STEPS = 3
# A process of the run hangs, never arrived, or is gone.
EXIT_LOST_RANK = 4
# A signal stopped the run, after it had saved or before there was a step to save: start it again. EX_TEMPFAIL of
# sysexits.h.
EXIT_INTERRUPTED = 75


def first_line(error: BaseException) -> str:
    """Message of an error in one line without a full stop; its type where it has none. Of an error that gathers those
    of several ranks, as torch's of checkpoints, that of the first."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        return first_line(next(iter(failures.values()))[0])
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


class UserError(ValueError):
    """A mistake of the user's: the message says in one sentence what is wrong, where, and what to do.

    Programs print the sentence alone, without a traceback, and exit with code 2.
    """


class RankError(UserError):
    """A mistake that one rank alone has found, while the others wait for it: that rank reports it."""


class RunStopped(Exception):
    """A run ended before its last step for a reason of its own, which is the message; `code` is the exit code."""

    code = 1
    title = "error"


class BadSteps(RunStopped):
    """Too many steps in a row were skipped, or all of the run, or its last loss is not finite. Raised on all ranks."""

    code = EXIT_BAD_STEPS


class Interrupted(RunStopped):
    """A signal stopped the run, after it had saved or before there was a step to save. Raised on all ranks."""

    code = EXIT_INTERRUPTED
    title = "interrupted"


class LostRank(RunStopped):
    """This rank cannot reach another one. Each rank that notices reports it: which of them will is not known."""

    code = EXIT_LOST_RANK


def report(error: UserError | RunStopped) -> int:
    """Print the message of `error` alone and return its exit code.

    Rank 0 prints what all ranks know, a rank itself what it alone knows.
    """
    rank = os.environ.get("RANK", "0")
    alone = isinstance(error, RankError | LostRank)
    title = error.title if isinstance(error, RunStopped) else "error"
    where = f" (rank {rank})" if alone and "RANK" in os.environ else ""
    message = f"{title}: {error}{where}"
    if rank == "0" or alone:
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
    _write_for_torchrun(message, printed=rank == "0" or alone)
    return error.code if isinstance(error, RunStopped) else EXIT_USER_ERROR


def _write_for_torchrun(message: str, *, printed: bool) -> None:
    """Write the message where torchrun looks for it: its own report then ends with it, not with a link.

    printed: this rank has printed it; rank 0 may be ended before it could, which our launcher makes good.

    A second early: torchrun's report is on the rank with the earliest time in whole seconds, and of those that it has
    ended itself the time is that of their end.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    extra = {"py_callstack": " ".join(message.split()), "timestamp": str(int(time.time()) - 1), "printed": printed}
    content = {"message": {"message": message, "extraInfo": extra}}
    # It is only torchrun's report that lacks the message then.
    with contextlib.suppress(OSError), open(file, "w", encoding="utf8") as stream:
        json.dump(content, stream)


def exit_on_user_error(program: Callable[[], None]) -> None:
    """Run `program`; a UserError or RunStopped ends the process with its code after its message."""
    mute()
    try:
        program()
    except (UserError, RunStopped) as error:
        raise SystemExit(report(error)) from None

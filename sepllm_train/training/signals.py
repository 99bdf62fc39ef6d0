"""Signals that end a run in good order: the step is finished, a checkpoint saved, the process ends with its own code.

SIGTERM (schedulers, torchrun), SIGUSR1 (a scheduler's warning before the time limit) and SIGINT (Ctrl-C) mean the
same. A handler only notes the signal: the ranks agree on the step at which they stop in the reduction that every step
does anyway, so that a signal to one of them is enough.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Request to this process to stop; `name` is the first signal it got, None without one."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._owner = os.getpid()

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler: remember the first signal; later ones change nothing, so they cannot break a save."""
        # Data workers are forks with the same handler: a signal to the whole process group is not for them.
        if self.name is not None or os.getpid() != self._owner:
            return
        self.name = signal.Signals(number).name
        if os.environ.get("RANK", "0") == "0":
            # Not print: the handler may have interrupted one.
            os.write(2, f"{self.name} received: finishing the step, saving, then ending.\n".encode())


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note the signals of STOPPING for the duration of the block. Only for the main thread.

    A process that was asked to stop ignores them from then on: they may come again until it is gone, and its exit code
    must still be that of what it did.
    """
    request = StopRequest()
    before = {number: signal.signal(number, request.note) for number in STOPPING}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if request.name is None else signal.SIG_IGN)

"""Signals that end a run in good order: the step is finished, a checkpoint saved, the process ends with its own code.

`base.signals` has which signals these are. A handler only notes the signal: the ranks agree on the step at which they
stop in the reduction that every step does anyway, so that a signal to one of them is enough.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sepllm_train.base.signals import decide, handled


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
    """Note the signals of `base.signals.STOPPING` for the duration of the block. Only for the main thread.

    After it signals change nothing more: the exit code is that of what was done.
    """
    request = StopRequest()
    with handled(request.note, lambda: request.name is not None):
        try:
            yield request
        finally:
            decide()

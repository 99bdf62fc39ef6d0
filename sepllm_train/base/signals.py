"""Signals that end training in good order, from the start of the program on.

SIGTERM (schedulers, torchrun), SIGUSR1 (a scheduler's warning before the time limit), SIGINT (Ctrl-C) and SIGHUP (the
terminal is gone) mean the same. SIGINT and SIGHUP stay ignored where the program was started so: in the background of a
script, under nohup. Needs nothing but the standard library: it is imported first.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sepllm_train.base.errors import EXIT_INTERRUPTED

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], Any]
# False once the program's exit code is decided by what it has done.
_undecided = True


def heeded() -> tuple[signal.Signals, ...]:
    """Those of STOPPING that this process was not started to ignore."""
    ignorable = (signal.SIGINT, signal.SIGHUP)
    return tuple(one for one in STOPPING if not (one in ignorable and signal.getsignal(one) is signal.SIG_IGN))


@contextmanager
def handled(handler: Handler, kept: Callable[[], bool]) -> Iterator[None]:
    """Handle the signals of STOPPING by `handler` for the duration of the block.

    `kept`: when true at the end, they are ignored from then on: they may come again until the process is gone, and its
    exit code must still be that of what it did. Only for the main thread.
    """
    before = {number: signal.signal(number, handler) for number in heeded()}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_IGN if kept() else earlier)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """End the process with EXIT_INTERRUPTED on a signal of STOPPING, as long as nothing else handles them in the block.

    Not by an exception: it would be lost where a library imports what may not be there. Nothing is done yet that is not
    on the disk as a whole or thrown away by the next start.
    """
    global _undecided
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()
    _undecided = True

    def end(number: int, frame: FrameType | None) -> None:
        if not _undecided or os.getpid() != owner:
            return
        if os.environ.get("RANK", "0") == "0":
            # Not print: the handler may have interrupted one.
            name = signal.Signals(number).name
            text = f"interrupted: {name} came before there was a step to save; the same command starts again.\n"
            os.write(2, text.encode())
        os._exit(EXIT_INTERRUPTED)

    before = {number: signal.signal(number, end) for number in heeded()}
    try:
        yield
    finally:
        for number, earlier in before.items():
            if signal.getsignal(number) is end:
                signal.signal(number, earlier)


def decide() -> None:
    """Let signals to this program change nothing more where `ending_at_once` handles them."""
    global _undecided
    _undecided = False

"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import signal
import sys

# Of linux/prctl.h.
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Let this process get SIGTERM when its parent is gone, however that ended. Linux alone has that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

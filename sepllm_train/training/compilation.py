"""Tells of what torch.compile does, which it does when a function is first called."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from torch._dynamo.callback import callback_handler

from sepllm_train.training.watchdog import Watchdog

# A compilation that takes longer, on top of training.hang_seconds, hangs.
ALLOWED_SECONDS = 300.0


class Compilation:
    """Counts and times the compilations of this process within a block, and keeps the watchdog quiet meanwhile."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        self.graphs = 0
        self.seconds = 0.0
        self._began = 0.0

    def __enter__(self) -> Compilation:
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        callback_handler.remove_start_callback(self._start)
        callback_handler.remove_end_callback(self._end)

    def _start(self, _: Any) -> None:
        self.watchdog.allow(ALLOWED_SECONDS)
        self._began = time.perf_counter()

    def _end(self, _: Any) -> None:
        self.watchdog.allow(0.0)
        self.graphs += 1
        self.seconds += time.perf_counter() - self._began

    def take(self) -> str:
        """A sentence about the compilations since the last call; nothing if there were none."""
        if not self.graphs:
            return ""
        line = f"compiled: {self.graphs} forward and backward functions in {self.seconds:.1f} s"
        self.graphs, self.seconds = 0, 0.0
        return line

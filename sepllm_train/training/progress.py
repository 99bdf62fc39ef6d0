"""Progress inside a long step: micro-batches done, on one line that is rewritten."""

from __future__ import annotations

import os
import sys
import time

from sepllm_train.base.console import duration, say

# A step shorter than this needs no progress of its own.
PATIENCE_SECONDS = 10.0
# Lines in a log file instead of a rewritten line on a terminal.
LOG_SECONDS = 60.0


class StepProgress:
    """Tells how far a step is once it has taken ten seconds. Only rank 0 prints."""

    def __init__(self, micro_batches: int, steps: int) -> None:
        self.micro_batches = micro_batches
        self.steps = steps
        self.terminal = sys.stdout.isatty()
        self.active = os.environ.get("RANK", "0") == "0" and micro_batches > 1
        self.step = 0
        self.began = self.told = time.perf_counter()
        self.shown = False

    def begin(self, step: int) -> None:
        """A step starts."""
        self.step, self.shown = step, False
        self.began = self.told = time.perf_counter()

    def micro_batch(self, number: int) -> None:
        """The forward pass of micro-batch `number` (from 1) starts."""
        now = time.perf_counter()
        wait = PATIENCE_SECONDS if self.terminal or not self.shown else LOG_SECONDS
        if not self.active or number < 2 or now - self.told < wait:
            return
        self.told, self.shown = now, True
        left = (now - self.began) / (number - 1) * (self.micro_batches - number + 1)
        text = (
            f"step {self.step}/{self.steps}: micro-batch {number}/{self.micro_batches}, step done in {duration(left)}"
        )
        if self.terminal:
            print(f"\r\033[K{text}", end="", flush=True)
        else:
            say(text)

    def end(self) -> None:
        """The step is over: clear the rewritten line."""
        if self.terminal and self.shown:
            print("\r\033[K", end="", flush=True)

"""TensorBoard: RUN/tensorboard, read by `tensorboard --logdir runs`."""

from __future__ import annotations

import json
import queue
import threading
from pathlib import Path
from typing import Any


class TensorBoardTracker:
    """Writes every number of a record as a scalar under its own name, at the record's step.

    When a run is resumed, what it wrote before is purged and written again from metrics.jsonl, so that records which
    the resumed run does not stand on do not stay. `facts` are written as text.
    """

    title = "TensorBoard"

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder / "tensorboard"
        self.facts = facts
        self.messages: queue.SimpleQueue[str] = queue.SimpleQueue()

    def open(self) -> int:
        """Start an event file."""
        from torch.utils.tensorboard import SummaryWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        resumed = any(self.folder.iterdir())
        self._quiet = _QuietThreads()
        self.writer = SummaryWriter(str(self.folder), purge_step=0 if resumed else None)
        self.writer.add_text("run", f"```json\n{json.dumps(self.facts, indent=2, default=str)}\n```", 0)
        self.messages.put(f"TensorBoard: tensorboard --logdir {self.folder.parent.parent}")
        return 0

    def log(self, record: dict[str, Any]) -> None:
        """Write the numbers of a record; `step` itself is their x-axis."""
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self.writer.add_scalar(key, value, record["step"])

    def close(self, status: str) -> None:
        """Write what is still in memory and close the file."""
        self.writer.close()
        self._quiet.end()

    def abandon(self) -> None:
        """Nothing of it outlives the process: its threads are daemons."""


class _QuietThreads:
    """Until `end`, no traceback of TensorBoard's own thread is printed: the next call raises what ended it."""

    def __init__(self) -> None:
        self.before = threading.excepthook
        threading.excepthook = self._hook

    def end(self) -> None:
        """Let threads print as before."""
        threading.excepthook = self.before

    def _hook(self, failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self.before(failure)

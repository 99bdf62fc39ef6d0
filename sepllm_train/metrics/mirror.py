"""Hands every record of metrics.jsonl to a tracker, from a thread of its own, so that no tracker can hold up a run."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from pathlib import Path
from typing import Any, Protocol

from sepllm_train.base.console import say
from sepllm_train.base.errors import first_line

# Seconds that the start and the end of a run wait for its tracker; an interrupted run has little time left.
START_SECONDS, END_SECONDS, INTERRUPTED_SECONDS = 60.0, 60.0, 10.0
# Records that wait for a tracker that does not take them.
_MOST_WAITING = 10_000


class Tracker(Protocol):
    """Where records are mirrored to. All but `abandon` are called in one thread and may raise anything."""

    title: str
    # What the user should read, put there by the tracker and said by the run.
    messages: queue.SimpleQueue[str]

    def open(self) -> int:
        """Begin. Gives the first step of which the tracker has no records yet."""

    def log(self, record: dict[str, Any]) -> None:
        """Take one record, as metrics.jsonl has it."""

    def close(self, status: str) -> None:
        """End well; `status` is run.json's."""

    def abandon(self) -> None:
        """End at once, from any thread and whatever the other calls are doing, and leave no process behind."""


class Mirror:
    """Feeds `tracker` with the records that `path` (metrics.jsonl) has at the start, then with those given to `log`.

    metrics.jsonl is the source of truth. A tracker that raises, hangs or falls behind is told of in one warning and
    left: nothing is raised here, and no call waits for longer than the limits of this module. A tracker says with
    `open` from which step on it lacks records; the others are not given to it again.
    """

    def __init__(self, tracker: Tracker, path: Path) -> None:
        self.tracker = tracker
        self._earlier = path.read_bytes().splitlines() if path.exists() else []
        self._records: queue.Queue[dict[str, Any] | None] = queue.Queue(_MOST_WAITING)
        self._opened = threading.Event()
        self._status = "failed"
        self._failure: str | None = None
        self._off = False
        self._thread = threading.Thread(target=self._feed, name=tracker.title, daemon=True)

    def start(self, seconds: float = START_SECONDS) -> None:
        """Open the tracker. Data workers must be forked after this: what it imports is imported then."""
        self._thread.start()
        if not self._opened.wait(seconds):
            self._leave(f"it did not start within {seconds:g} seconds")
        self._tell()

    def log(self, record: dict[str, Any]) -> None:
        """Pass a record on. It must not be changed afterwards."""
        self._tell()
        if self._off:
            return
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._leave(f"{_MOST_WAITING:,} records wait for it")

    def close(self, status: str) -> None:
        """End the tracker, once; `status` is how the run ended, as in run.json."""
        if not self._off:
            self._status = status
            seconds = END_SECONDS if status == "finished" else INTERRUPTED_SECONDS
            try:
                self._records.put_nowait(None)
                self._thread.join(seconds)
            except queue.Full:
                pass
            if self._thread.is_alive():
                self._leave(f"it did not end within {seconds:g} seconds")
        self._tell()
        self._off = True

    def _feed(self) -> None:
        """Body of the thread."""
        try:
            first = self.tracker.open()
            self._opened.set()
            for line in self._earlier:
                self._pass_on(json.loads(line), first)
            self._earlier.clear()
            while (record := self._records.get()) is not None:
                self._pass_on(record, first)
            self.tracker.close(self._status)
        except BaseException as error:
            # Whatever a tracker raises, SystemExit too: the run goes on.
            self._failure = first_line(error)
            if not self._off:
                self.tracker.abandon()
        self._opened.set()

    def _pass_on(self, record: dict[str, Any], first: int) -> None:
        """Give the tracker a record that it lacks; numbers that JSON does not have are left out."""
        if record["step"] >= first:
            self.tracker.log({key: value for key, value in record.items() if value is not None})

    def _leave(self, reason: str) -> None:
        """Give the tracker up."""
        self._off = True
        with contextlib.suppress(Exception):
            self.tracker.abandon()
        self._warn(reason)

    def _tell(self) -> None:
        """Say that the tracker failed, if it did, and what it has to say."""
        if self._failure is not None and not self._off:
            self._off = True
            self._warn(self._failure)
        while not self.tracker.messages.empty():
            say(self.tracker.messages.get())

    def _warn(self, reason: str) -> None:
        say(f"warning: {self.tracker.title} is off ({reason}): training goes on, and metrics.jsonl has every record.")

"""Trackers that mirror metrics.jsonl: the choice of one, and the thread that feeds it.

The thread hands every record of metrics.jsonl to the tracker, so that no tracker can hold up a run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError, first_line
from sepllm_train.config.schema import LoggingConfig
from sepllm_train.metrics.log import MetricsLog

# Module that a tracker needs -> the extra of setup.py that brings it.
_NEEDED = {"wandb": ("wandb", "wandb"), "tensorboard": ("tensorboard", "tensorboard")}
# Seconds that the start and the end of a run wait for its tracker; an interrupted run has little time left.
START_SECONDS, END_SECONDS, INTERRUPTED_SECONDS = 60.0, 60.0, 10.0
# Records that wait for a tracker that does not take them.
_MOST_WAITING = 10_000


class Tracker(Protocol):
    """A service or file that records go to. All calls but `abandon` come from one thread and may raise anything."""

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

    metrics.jsonl is the source of truth. A tracker that raises, hangs or falls behind gets one warning and is
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


def check_tracker(logging: LoggingConfig) -> None:
    """Raise UserError when the tracker that is asked for is not installed, or has no key for mode=online."""
    if logging.tracker == "none":
        return
    module, extra = _NEEDED[logging.tracker]
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"logging.tracker={logging.tracker} needs the package {module}, which is not installed: "
            f"python -m pip install -e '.[{extra}]', or logging.tracker=none."
        )
    if logging.tracker == "wandb":
        from sepllm_train.metrics.wandb_tracker import has_key, host

        if logging.mode == "online" and not has_key():
            raise UserError(
                f"logging.mode=online needs an API key for {host()}: run `wandb login`, set WANDB_API_KEY, or take "
                "logging.mode=offline."
            )


def wandb_mode(logging: LoggingConfig) -> str:
    """online, offline or disabled: `auto` is what WANDB_MODE says, or online with an API key and offline without."""
    if logging.mode != "auto":
        return logging.mode
    from sepllm_train.metrics.wandb_tracker import has_key

    said = os.environ.get("WANDB_MODE", "")
    return said if said in ("online", "offline", "disabled") else "online" if has_key() else "offline"


def start_mirror(
    logging: LoggingConfig, metrics: MetricsLog, folder: Path, name: str, facts: Callable[[], dict[str, Any]]
) -> Mirror | None:
    """Mirror what `metrics` has and gets to the tracker that is asked for, of a run called `name` in `folder`.

    `facts` gives what describes the run, as nested dictionaries. None without a tracker.
    """
    tracker = _tracker_of(logging, folder, name, facts)
    if tracker is None:
        return None
    mirror = Mirror(tracker, metrics.path)
    mirror.start()
    metrics.mirror = mirror.log
    return mirror


def _tracker_of(logging: LoggingConfig, folder: Path, name: str, facts: Callable[[], dict[str, Any]]) -> Tracker | None:
    """The tracker that is asked for, or None."""
    if logging.tracker == "tensorboard":
        from sepllm_train.metrics.tensorboard_tracker import TensorBoardTracker

        return TensorBoardTracker(folder, facts())
    if logging.tracker == "wandb" and (mode := wandb_mode(logging)) != "disabled":
        from sepllm_train.metrics.wandb_tracker import WandbTracker

        return WandbTracker(logging, folder, name, mode, facts())
    return None

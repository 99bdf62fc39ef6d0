"""The watchdog: ends a run in which a process has stopped making progress, and reports which one and where."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from sepllm_train.base.console import duration
from sepllm_train.base.errors import EXIT_LOST_RANK

# Ranks that can still report where they are get this fraction of training.hang_seconds, within limits, to do so.
_GRACE_SHARE, _GRACE_SECONDS = 0.25, (1.0, 30.0)
# Ranks named in the message.
_NAMED = 8


@dataclass(frozen=True)
class Place:
    """Place of a rank: how often it reported progress (all ranks do at the same points of the run), and in words."""

    beats: int
    where: str


class Watchdog:
    """Watches this rank's progress, as reported by `beat`, from a thread. A context manager; 0 seconds watch nothing.

    When there has been none for `seconds`, every rank that can writes RUN/stacks_rankN.txt: its place, then the stacks
    of its threads, which it also prints. The ranks that wrote none are stopped or gone; among those that did, the ones
    furthest behind hold up the others. The lowest rank reports it, and all end with EXIT_LOST_RANK.
    """

    def __init__(self, folder: Path, seconds: float, rank: int, world_size: int) -> None:
        self.folder = folder
        self.seconds = seconds
        self.rank = rank
        self.world_size = world_size
        self.place = Place(0, "the start")
        self.last = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, where: str) -> None:
        """Report progress: this rank is now at `where`, a noun such as `step 3, micro-batch 2`."""
        self.place = Place(self.place.beats + 1, where)
        self.last = time.monotonic()

    def allow(self, seconds: float) -> None:
        """Let the next `seconds` of this rank not count as silence."""
        self.last = time.monotonic() + seconds

    def __enter__(self) -> Watchdog:
        self.stacks_file(self.rank).unlink(missing_ok=True)
        if self.seconds > 0:
            self.last = time.monotonic()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def stacks_file(self, rank: int) -> Path:
        """File of a rank's stacks."""
        return self.folder / f"stacks_rank{rank}.txt"

    def _watch(self) -> None:
        """Body of the thread."""
        wait = min(self.seconds / 10, 5.0)
        looked = time.monotonic()
        while not self._stop.wait(wait):
            now = time.monotonic()
            if now - looked > wait + self.seconds / 2:
                # This very process was stopped (Ctrl-Z, a debugger): not a hang of the run.
                self.last = now
            looked = now
            if now - self.last > self.seconds:
                self._end()

    def _end(self) -> None:
        """Report where this rank and the others are, and end the process."""
        place, silent = self.place, time.monotonic() - self.last
        grace = min(max(self.seconds * _GRACE_SHARE, _GRACE_SECONDS[0]), _GRACE_SECONDS[1])
        # Whatever blocks below (the file system, a full pipe), this process ends.
        last_resort = threading.Timer(2 * grace + 1, os._exit, (EXIT_LOST_RANK,))
        last_resort.daemon = True
        last_resort.start()
        print(f"rank {self.rank} hangs in {place.where}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr.fileno())
        unwritten = self._write_stacks(place, grace)
        if unwritten:
            message = self._alone(place, silent, unwritten)
        else:
            places = self._hear(grace)
            message = self._message(places, silent) if self.rank == min(places) else ""
        if message:
            print(f"error: {message}", file=sys.stderr, flush=True)
        # The main thread hangs, so nothing can be closed in good order.
        os._exit(EXIT_LOST_RANK)

    def _write_stacks(self, place: Place, seconds: float) -> str:
        """Write this rank's file; returns the reason when that failed, else nothing.

        In a thread: on a file system that hangs, which may be why the run does, opening the file never returns.
        """
        failure = [f"it did not answer for {seconds:g} seconds"]

        def write() -> None:
            try:
                with open(self.stacks_file(self.rank), "w", encoding="utf8") as file:
                    file.write(json.dumps(asdict(place)) + "\n")
                    file.flush()
                    faulthandler.dump_traceback(file)
            except OSError as error:
                failure[0] = error.strerror or str(error)
            else:
                failure.clear()

        thread = threading.Thread(target=write, name="stacks", daemon=True)
        thread.start()
        thread.join(seconds)
        return failure[0] if failure else ""

    def _hear(self, seconds: float) -> dict[int, Place]:
        """Places of the ranks that report theirs within `seconds`."""
        places: dict[int, Place] = {}
        deadline = time.monotonic() + seconds
        while len(places) < self.world_size and time.monotonic() < deadline:
            for rank in set(range(self.world_size)) - places.keys():
                try:
                    line = self.stacks_file(rank).read_text(encoding="utf8").split("\n", 1)[0]
                    places[rank] = Place(**json.loads(line))
                except (OSError, ValueError):
                    continue
            time.sleep(0.1)
        return places

    def _alone(self, place: Place, silent: float, unwritten: str) -> str:
        """Message of this rank when the ranks cannot read each other's places."""
        return (
            f"no progress for {duration(silent)} (training.hang_seconds={self.seconds:g}): rank {self.rank} hung in "
            f"{place.where}, and {self.stacks_file(self.rank)} could not be written ({unwritten}): look at its file "
            "system. The same command continues from the newest checkpoint."
        )

    def _message(self, places: dict[int, Place], silent: float) -> str:
        """Message that names the ranks which hold up the run, as far as the places show."""
        missing = sorted(set(range(self.world_size)) - places.keys())
        behind = min(places.values(), key=lambda place: place.beats)
        slow = sorted(rank for rank, place in places.items() if place.beats == behind.beats)
        begin = f"no progress for {duration(silent)} (training.hang_seconds={self.seconds:g}): "
        files = f"stacks are in {self.stacks_file(0).with_name('stacks_rank*.txt')}"
        again = "The same command continues from the newest checkpoint."
        if missing:
            return (
                f"{begin}{_ranks(missing)} gave no sign of life, and {_ranks(sorted(places))} waited in "
                f"{places[min(places)].where}; {files}. Look at the machine of {_ranks(missing[:1])}. {again}"
            )
        if len(slow) < self.world_size:
            return f"{begin}{_ranks(slow)} hung in {behind.where}, behind the others; {files}. {again}"
        return f"{begin}all processes hung in {behind.where}; {files}. {again}"


def _ranks(ranks: list[int]) -> str:
    """`rank 3`, `ranks 3, 5`, `ranks 0, 1, ... (64 of them)`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    named = ", ".join(map(str, ranks[:_NAMED]))
    return f"ranks {named}" + (f", ... ({len(ranks)} of them)" if len(ranks) > _NAMED else "")

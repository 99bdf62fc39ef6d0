"""All runs that are watched, and their state as the page fetches it."""

from __future__ import annotations

import json
import secrets
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sepllm_train.base.errors import UserError
from sepllm_train.compare.variants import REQUIRED, check_comparable
from sepllm_train.runs.records import Run
from sepllm_train.watch.follow import FollowedRun

# Content type of `Watch.state`.
STATE_TYPE = "application/octet-stream"


class Watch:
    """Follows run folders. Every method may be called from any thread.

    Raises UserError for what is no folder, and for a folder given twice.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        seen: dict[Path, Path] = {}
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"{folder} is not a folder: give the folder of a run, such as runs/NAME.")
            twin = seen.setdefault(folder.resolve(), folder)
            if twin is not folder:
                raise UserError(f"{folder} is the same run as {twin}: name each run once.")
        self.runs = [FollowedRun(folder) for folder in folders]
        # Versions of another server do not count.
        self._session = secrets.token_hex(4)
        self._version = 1
        self._changed = [1] * len(self.runs)
        self._lock = threading.Lock()
        self._loading = True
        for run in self.runs:
            run.look()

    @property
    def total(self) -> int:
        """Bytes of all files of records."""
        return sum(run.size for run in self.runs)

    def load(self, report: Callable[[int], None], stop: threading.Event) -> None:
        """Read everything there is, telling the bytes as they are read. Until then `refresh` reads nothing."""
        try:
            for number, run in enumerate(self.runs):
                pending = run.pending
                while not stop.is_set():
                    with self._lock:
                        self._read(number)
                    report(pending - run.pending)
                    if run.pending in (0, pending):
                        break
                    pending = run.pending
                    # A lock that is given back and taken again at once would keep requests waiting.
                    time.sleep(0.001)
        finally:
            self._loading = False

    def _read(self, number: int) -> None:
        """Read on in one run. Call it with the lock held."""
        run = self.runs[number]
        version = run.version
        if run.read():
            self._version += 1
            if run.version != version:
                self._changed[number] = self._version

    def refresh(self) -> None:
        """Take in what is new, a slice of each file at most."""
        if not self._loading:
            with self._lock:
                for number in range(len(self.runs)):
                    self._read(number)

    def tag(self, scale: str) -> str:
        """Version of the state for axes of `scale`: equal tags, equal content."""
        return f"{self._session}-{scale}-{self._version}"

    def state(self, scale: str, since: str) -> tuple[str, bytes]:
        """Tag and state: length of a JSON header (u32, little-endian), the header, curves as float32.

        The header has facts of every run. Curves are given of the runs whose rows have changed since the tag `since`;
        for these, `curves` has the number of points, and the values of each of its columns follow one another.
        """
        with self._lock:
            tag = self.tag(scale)
            prefix, _, version = since.rpartition("-")
            own = prefix == f"{self._session}-{scale}" and version.isdecimal() and len(version) < 20
            known = int(version) if own else 0
            labels = self._labels()
            runs: list[dict[str, Any]] = []
            values: list[bytes] = []
            for run, label, changed in zip(self.runs, labels, self._changed, strict=True):
                facts = {"label": label, **run.facts()}
                if changed > known:
                    curves = run.curves(scale)
                    facts["curves"] = {name: curve.shape[1] for name, curve in curves.items()}
                    values += [curve.tobytes() for curve in curves.values()]
                runs.append(facts)
            pending = sum(run.pending for run in self.runs)
            header = json.dumps(
                {
                    "tag": tag,
                    "now": time.time(),
                    "read": self.total - pending,
                    "total": self.total,
                    "loading": self._loading or pending > 0,
                    "notes": self._notes(labels),
                    "runs": runs,
                },
                allow_nan=False,
            ).encode()
        header += b" " * (-len(header) % 4)
        return tag, b"".join([struct.pack("<I", len(header)), header, *values])

    def _labels(self) -> list[str]:
        """Names of the runs, with their folders where two have one name."""
        names = [run.name for run in self.runs]
        return [
            name if names.count(name) == 1 else f"{name} ({run.folder})"
            for name, run in zip(names, self.runs, strict=True)
        ]

    def _notes(self, labels: Sequence[str]) -> list[str]:
        """A sentence for each run whose losses do not compare with the first one's."""
        known = [
            Run(run.folder, label, run.info)
            for run, label in zip(self.runs, labels, strict=True)
            if isinstance(run.info.get("comparable"), dict) and REQUIRED.keys() <= run.info["comparable"].keys()
        ]
        notes = []
        for run in known[1:]:
            try:
                check_comparable([known[0], run])
            except UserError as error:
                reason = str(error).removeprefix("The runs cannot be compared, ")
                notes.append(f"Losses of {run.label} do not compare with those of {known[0].label}: {reason}")
        return notes

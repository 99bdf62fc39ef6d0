"""Files of a run folder that must stay while the run trains: what is done to them is noticed, what they had is kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sepllm_train.base.errors import UserError
from sepllm_train.base.files import write_whole
from sepllm_train.metrics.log import MetricsLog, kept_name
from sepllm_train.training import run_folder

# Written when the run begins, and by nobody else until it ends.
DESCRIPTION = ("config.yaml", "environment.json", "run.json")


@dataclass(frozen=True)
class Disturbance:
    """A disturbance of a run's folder. `message` says so; `usable`: checkpoints can still be written there."""

    message: str
    usable: bool


class FolderWatch:
    """Looks after the folder of a run that has just been described there; rank 0 alone has one."""

    def __init__(self, folder: Path, logs: Sequence[MetricsLog]) -> None:
        self.folder = folder
        self.logs = logs
        self._status = os.stat(folder)
        self._content = {name: (folder / name).read_bytes() for name in DESCRIPTION if (folder / name).exists()}
        self._seen = {name: _signature(folder / name) for name in self._content}
        self._lock: IO[str] | None = None

    def owns_folder(self) -> bool:
        """True while the folder of the run's name is the one that the run began in, or made again."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(self.folder), self._status)
        return False

    def check(self) -> Disturbance | None:
        """Look at the folder. What was removed or replaced is written again from what this process has."""
        faults = []
        if not os.path.lexists(self.folder):
            faults.append(f"{self.folder} was removed")
        elif not self.owns_folder():
            return Disturbance(
                f"{self.folder} was replaced by another while the run trained: nothing more is written there; continue "
                "from a checkpoint where the folder is now, or choose another name=",
                usable=False,
            )
        changed = [name for name in self._content if self._changed(name)]
        lost = [(log, fault) for log in self.logs if (fault := log.fault()) is not None]
        if not faults:
            faults += [f"{self.folder / name} was {_how(self.folder / name)}" for name in changed]
            faults += [f"{log.path} {fault}" for log, fault in lost]
        if not faults:
            return None
        message = f"{' and '.join(faults)} while the run trained"
        try:
            places = self._put_back(changed, [log for log, _ in lost])
        except (OSError, UserError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error).rstrip(".")
            return Disturbance(f"{message}, and cannot be written again ({reason})", usable=False)
        return Disturbance(f"{message}: what this process had of it is in {', '.join(map(str, places))}", usable=True)

    def _put_back(self, changed: Sequence[str], logs: Sequence[MetricsLog]) -> list[Path]:
        """Write again what is not there as it was; gives the names."""
        if not self.folder.exists():
            self._lock = run_folder.claim(self.folder)
            self._status = os.stat(self.folder)
        places = []
        for name in changed:
            path = self.folder / name
            places.append(kept_name(path) if os.path.lexists(path) else path)
            write_whole(places[-1], self._content[name])
            self._seen[name] = _signature(path)
        return [*places, *(log.put_back() for log in logs)]

    def _changed(self, name: str) -> bool:
        """True when a file does not hold what the run wrote."""
        signature = _signature(self.folder / name)
        if signature is not None and signature == self._seen[name]:
            return False
        with contextlib.suppress(OSError):
            if signature is not None and (self.folder / name).read_bytes() == self._content[name]:
                self._seen[name] = signature
                return False
        return True


def _how(path: Path) -> str:
    return "replaced" if os.path.lexists(path) else "removed"


def _signature(path: Path) -> tuple[int, int, int] | None:
    """Changes when a file is written or exchanged; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns

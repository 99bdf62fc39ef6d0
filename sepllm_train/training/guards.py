"""Guards of a run: requests to stop, progress, the data's files, torch.compile, lost data workers."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch._dynamo.callback import callback_handler

from sepllm_train.base.errors import RankError, UserError
from sepllm_train.data.corpus import DataFiles
from sepllm_train.distributed.collectives import on_all_ranks
from sepllm_train.training.folder_watch import Disturbance, FolderWatch
from sepllm_train.training.signals import StopRequest
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
        """Console line about the compilations since the last call; empty if there were none."""
        if not self.graphs:
            return ""
        line = f"compiled: {self.graphs} forward and backward functions in {self.seconds:.1f} s"
        self.graphs, self.seconds = 0, 0.0
        return line


@dataclass
class Guards:
    """Of this rank. `folder` watches the run's folder, on rank 0 once the run is described there. `lost_workers` counts
    data workers that were replaced since the last `numbers`."""

    stop: StopRequest
    watchdog: Watchdog
    files: DataFiles
    compilation: Compilation
    folder: FolderWatch | None = field(default=None, init=False)
    lost_workers: int = field(default=0, init=False)

    def numbers(self) -> list[float]:
        """(1 if this rank was asked to stop, data workers it lost since the last call), to be summed over ranks."""
        lost, self.lost_workers = self.lost_workers, 0
        return [float(self.stop.name is not None), float(lost)]

    def check_data(self) -> None:
        """Raise UserError on every rank when rank 0 sees a file of the data changed. Every rank calls it."""
        on_all_ranks(lambda: self.files.check() if dist.get_rank() == 0 else None)

    def disturbed_folder(self) -> Disturbance | None:
        """The disturbance of the run's folder that rank 0 sees, or None. Every rank calls it."""
        found = [None if self.folder is None else self.folder.check()]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def worker_lost(self, message: str) -> None:
        """Count and report a lost data worker of this rank. Raises RankError when the data was changed under it."""
        try:
            self.files.check()
        except UserError as error:
            raise RankError(str(error)) from None
        self.lost_workers += 1
        print(f"warning: rank {dist.get_rank()}: {message}.", file=sys.stderr, flush=True)

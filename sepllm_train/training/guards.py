"""What watches over a run: requests to stop, progress, the data's files, compilation, lost data workers."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch.distributed as dist

from sepllm_train.base.errors import RankError, UserError
from sepllm_train.data.unchanged import DataFiles
from sepllm_train.distributed.collectives import together
from sepllm_train.training.compilation import Compilation
from sepllm_train.training.signals import StopRequest
from sepllm_train.training.watchdog import Watchdog


@dataclass
class Guards:
    """Of this rank. `lost_workers` counts data workers that were replaced since the last `numbers`."""

    stop: StopRequest
    watchdog: Watchdog
    files: DataFiles
    compilation: Compilation
    lost_workers: int = field(default=0, init=False)

    def numbers(self) -> list[float]:
        """(whether this rank was asked to stop, data workers it lost since the last call), to be summed over ranks."""
        lost, self.lost_workers = self.lost_workers, 0
        return [float(self.stop.name is not None), float(lost)]

    def check_data(self) -> None:
        """Raise UserError on every rank when rank 0 sees a file of the data changed. Every rank calls it."""
        together(lambda: self.files.check() if dist.get_rank() == 0 else None)

    def worker_lost(self, sentence: str) -> None:
        """A data worker of this rank died. Raises RankError when that is because the data was changed under it."""
        try:
            self.files.check()
        except UserError as error:
            raise RankError(str(error)) from None
        self.lost_workers += 1
        print(f"warning: rank {dist.get_rank()}: {sentence}.", file=sys.stderr, flush=True)

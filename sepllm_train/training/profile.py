"""A trace of chosen steps: what ran when, for a viewer of Chrome traces, and a table of the slowest operators."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from sepllm_train.base.files import write_whole
from sepllm_train.config.schema import LoggingConfig

TABLE_ROWS = 40


class StepProfiler:
    """Records the steps of logging.profile on this rank, if it is one of logging.profile_ranks; else does nothing.

    Nothing is set up before the first of these steps, and nothing is left after the last.
    """

    def __init__(self, logging: LoggingConfig, folder: Path, rank: int, device: torch.device) -> None:
        chosen = logging.profile is not None and rank in logging.profile_ranks
        self.steps = range(logging.profile[0], logging.profile[1] + 1) if chosen and logging.profile else range(0)
        self.folder = folder
        self.rank = rank
        self.device = device
        self.recording: profile | None = None
        self.first = 0

    def before(self, step: int) -> None:
        """Step number `step` is about to begin."""
        if step in self.steps and self.recording is None:
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # the step before may not be over on the device
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self.recording, self.first = profile(activities=activities), step
            self.recording.start()

    def after(self, step: int) -> Path | None:
        """Step number `step` is over on the host. Gives the trace when one was written.

        A disk that cannot take the trace raises OSError.
        """
        if self.recording is None or step + 1 in self.steps:
            return None
        recording, self.recording = self.recording, None
        recording.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"steps_{self.first:08d}-{step:08d}_rank{self.rank}.json.gz"
        aside = trace.with_name(f".{trace.name}")  # keeps the ending, by which torch knows to compress
        recording.export_chrome_trace(str(aside))
        aside.replace(trace)
        order = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = recording.key_averages().table(sort_by=order, row_limit=TABLE_ROWS, max_name_column_width=80)
        write_whole(trace.with_name(trace.name.replace(".json.gz", ".txt")), table.encode())
        return trace

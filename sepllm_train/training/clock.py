"""Time of a training step by its parts: waiting for data, the plan, forward, backward, optimizer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

# Parts of a step, in its order. What is left of a step is communication between ranks and the loop itself.
PARTS = ("data_wait", "plan", "forward", "backward", "optimizer")
# What megatron-core's schedules call the parts that they run.
_MEGATRON_PARTS = {"forward-compute": "forward", "backward-compute": "backward"}


class StepClock:
    """Adds up the seconds of each part of the training steps since the last `take`.

    On a CPU the wall clock counts. On a GPU events in the stream do, which cost no synchronisation: `end` reads those
    that the device has come to, and `take` waits for the rest. Waiting for data happens on the host and is wall clock
    on both; the device may still be busy with the step before meanwhile. A part within another is taken out of it.
    This is also what megatron-core calls `timers`, so that its schedules time forward and backward by it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.running = False
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._open: list[tuple[str, float | torch.cuda.Event]] = []
        self._spans: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._spare: list[torch.cuda.Event] = []

    def begin(self) -> None:
        """Start a training step; code outside of one (a validation) is not timed."""
        self.running = True

    def end(self) -> None:
        """End the step on the host."""
        self.running = False
        self._open.clear()
        self._read(wait=False)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the step."""
        self.start(name)
        yield
        self.stop()

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call. Waits for the device."""
        self._read(wait=True)
        taken, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return taken

    def start(self, name: str) -> None:
        """Start a part; the one it lies in pauses."""
        if not self.running:
            return
        if self._open:
            self._close(*self._open[-1])
        self._open.append((name, self._now(name)))

    def stop(self) -> None:
        """End the part that began last; the one it lay in resumes."""
        if not self._open:
            return
        self._close(*self._open.pop())
        if self._open:
            outer = self._open.pop()[0]
            self._open.append((outer, self._now(outer)))

    def __call__(self, name: str, log_level: int = 0) -> _Timer:
        """megatron-core's way to ask for a timer; those of other parts do nothing."""
        return _Timer(self, _MEGATRON_PARTS.get(name))

    def _close(self, name: str, start: float | torch.cuda.Event) -> None:
        if isinstance(start, float):
            self.seconds[name] += time.perf_counter() - start
        else:
            self._spans.append((name, start, self._event()))

    def _read(self, *, wait: bool) -> None:
        """Add up the parts whose end the device has come to, or all."""
        if wait and self._spans:
            self._spans[-1][2].synchronize()
        while self._spans and self._spans[0][2].query():
            name, first, last = self._spans.popleft()
            self.seconds[name] += first.elapsed_time(last) / 1e3
            self._spare += (first, last)

    def _now(self, name: str) -> float | torch.cuda.Event:
        return self._event() if self.device.type == "cuda" and name != "data_wait" else time.perf_counter()

    def _event(self) -> torch.cuda.Event:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Timer:
    """megatron-core's timer of one part; `part` None is one that is not timed."""

    def __init__(self, clock: StepClock, part: str | None) -> None:
        self.clock, self.part = clock, part

    def start(self, barrier: bool = False) -> None:
        """Start it. The barrier that megatron-core may ask for would change what is measured."""
        if self.part is not None:
            self.clock.start(self.part)

    def stop(self, barrier: bool = False) -> None:
        """Stop it."""
        if self.part is not None:
            self.clock.stop()


def step_parts(seconds: dict[str, float], steps: int, device: torch.device) -> dict[str, float]:
    """Metrics of an interval of `steps` steps from each rank's `StepClock.take`, the same on every rank.

    `train/PART_seconds` are per step, the mean over ranks but for data_wait, which is the longest of any rank: all
    others wait for it. With several ranks `train/straggler_ratio` is the longest own time (data, plan, forward and
    backward) over the mean, and `train/straggler_rank` whose it is. Own time holds the collectives of tensor and
    context parallelism, so a slow rank makes the ranks it is grouped with look as slow; what it leaves out is waiting
    for other replicas and other pipeline stages.
    """
    own = torch.tensor([seconds[part] for part in PARTS], dtype=torch.float64, device=device)
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, own)
    table = torch.stack(ranks).cpu() / steps
    metrics = {f"train/{part}_seconds": value for part, value in zip(PARTS, table.mean(0).tolist(), strict=True)}
    metrics["train/data_wait_seconds"] = float(table[:, PARTS.index("data_wait")].max())
    if len(ranks) > 1:
        computing = table[:, : PARTS.index("optimizer")].sum(1)
        mean = float(computing.mean())
        metrics["train/straggler_ratio"] = float(computing.max()) / mean if mean > 0 else 1.0
        metrics["train/straggler_rank"] = int(computing.argmax())
    return metrics

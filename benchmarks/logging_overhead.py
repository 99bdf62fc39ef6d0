"""Share of a training step of demo_sep that logging costs: metrics.jsonl alone, with W&B offline, with TensorBoard.

python -m benchmarks.logging_overhead [--steps 8] [OVERRIDE ...]

Trains demo_sep once for each tracker with a record after every step. A record is timed in the training thread, from
the reduction over ranks to the last word on the console, beside the steps of the same run; both as medians. What a
tracker does meanwhile, in threads and in a process of its own, is counted in CPU seconds up to its end, the start left
out, for it takes no time of the training thread but may take some of its cores.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmarks.common import check_positive, exit_with
from sepllm_train.config.load import configuration_of
from sepllm_train.config.schema import Config
from sepllm_train.config.validate import validate
from sepllm_train.distributed.launch import Launch, device_of, launch_from_environment, model_parallel, reading_group
from sepllm_train.metrics.trackers import Mirror, check_tracker

BAR = 0.005
TRACKERS = {"none": "metrics.jsonl and console", "wandb": "with W&B, offline", "tensorboard": "with TensorBoard"}


@dataclass
class Seen:
    """Seconds of each step and of each record in the training thread; CPU seconds in the background, and records."""

    steps: list[float] = field(default_factory=list)
    records: list[float] = field(default_factory=list)
    background: float = 0.0

    @property
    def step(self) -> float:
        """Median of the steps."""
        return statistics.median(self.steps)

    @property
    def record(self) -> float:
        """Median of the records."""
        return statistics.median(self.records)

    @property
    def behind(self) -> float:
        """CPU seconds in the background for each record; the first one, which warms up, has some too."""
        return self.background / (len(self.records) + 1)


def main() -> None:
    """Print the shares and the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="steps of each run, after one to warm up")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="on top of +experiment=demo_sep")
    options = parser.parse_args()
    check_positive(options, "steps")
    launch = launch_from_environment()
    worst = 0.0
    with reading_group(launch), tempfile.TemporaryDirectory() as folder:
        for tracker, words in TRACKERS.items():
            config = configuration(tracker, folder, options.steps, options.overrides)
            check_tracker(config.logging)
            seen = measure(config, launch)
            worst = max(worst, (seen.record + seen.behind) / seen.step)
            print(line(words, seen, tracker != "none"), flush=True)
    verdict = "met" if worst <= BAR else "missed"
    print(f"bar: {BAR:.1%} of a step, background and all; at most {worst:.3%}: {verdict}")


def configuration(tracker: str, folder: str, steps: int, overrides: list[str]) -> Config:
    """demo_sep with a record after each step, and no validation or checkpoint between them."""
    own = [
        "+experiment=demo_sep",
        f"name={tracker}",
        f"run_root={folder}",
        f"training.steps={steps + 1}",
        "training.validation_samples=0",
        "training.checkpoint_interval=0",
        "logging.interval=1",
        f"logging.tracker={tracker}",
        "logging.mode=offline",
    ]
    config = configuration_of([*own, *overrides])
    validate(config, 1)
    return config


def measure(config: Config, launch: Launch) -> Seen:
    """Train `config` and time its steps and records."""
    from sepllm_train.training.run import train

    device = device_of(launch)
    with model_parallel(config, device), timing() as seen, contextlib.redirect_stdout(io.StringIO()):
        train(config, launch, device)
    # The first step warms up.
    seen.steps, seen.records = seen.steps[1:], seen.records[1:]
    return seen


@contextmanager
def timing() -> Iterator[Seen]:
    """Time the records of a run inside the block, and the background work of its tracker."""
    from sepllm_train.training.step_logger import StepLogger

    seen = Seen()
    log, start, close = StepLogger.log, Mirror.start, Mirror.close
    own: set[int] = set()
    at_start = 0.0

    def timed_log(self: StepLogger) -> None:
        if self.interval.steps:
            seen.steps.append(self.interval.seconds)
            begin = time.perf_counter()
            log(self)
            seen.records.append(time.perf_counter() - begin)

    def watched_start(self: Mirror, *arguments: Any) -> None:
        nonlocal at_start
        before = set(threading.enumerate())
        start(self, *arguments)
        own.update(thread.native_id or 0 for thread in set(threading.enumerate()) - before)
        at_start = cpu_seconds(own)

    def watched_close(self: Mirror, status: str) -> None:
        # What it still has to do is done when it can answer, which it does within a fraction of a step.
        time.sleep(min(1.0, seen.step))
        seen.background = cpu_seconds(own) - at_start
        close(self, status)

    StepLogger.log, Mirror.start, Mirror.close = timed_log, watched_start, watched_close  # type: ignore[method-assign, assignment]
    try:
        yield seen
    finally:
        StepLogger.log, Mirror.start, Mirror.close = log, start, close  # type: ignore[method-assign]


def cpu_seconds(threads: set[int]) -> float:
    """CPU time so far of these threads and of W&B's process."""
    process = psutil.Process()
    times = [t.user_time + t.system_time for t in process.threads() if t.id in threads]
    times += [sum(c.cpu_times()[:2]) for c in process.children() if c.name() == "wandb-core"]
    return sum(times)


def line(words: str, seen: Seen, tracked: bool) -> str:
    """Figures of one run."""
    text = (
        f"{words}: {seen.record * 1e3:.2f} ms a record = {seen.record / seen.step:.3%} of a step of {seen.step:.2f} s"
    )
    if not tracked:
        return text
    return f"{text} | in the background {seen.behind * 1e3:.1f} ms of CPU a record = {seen.behind / seen.step:.2%}"


if __name__ == "__main__":
    exit_with(main)

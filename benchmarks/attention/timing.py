"""Timing on a GPU (or, to try the programs, on a CPU), the machine's own limits, and what machine it is."""

from __future__ import annotations

import hashlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sep_attention.triton.tuning import TRITON_INSTALLED

from benchmarks import ROOT
from benchmarks.common import RESULTS
from sepllm_train.base.errors import UserError

# Clock cycles that the GPU waits before a timed call, a millisecond or so: the host has launched all of it by then.
WAIT_CYCLES = 2_000_000
# Larger than the second-level cache of any GPU so far.
FLUSH_BYTES = 256 * 2**20
MATMUL_SIZE = 8192
COPY_BYTES = 2**30


class Timing(NamedTuple):
    """Milliseconds of one call: median and quartiles of a number of calls.

    On a GPU they are the GPU's, once its launches have been queued; `host` is the median of what queuing them takes,
    which is what counts where the GPU has nothing else to do meanwhile.
    """

    median: float
    low: float
    high: float
    calls: int
    host: float


class Clock:
    """Times calls on a device, each on a second-level cache that holds none of its input."""

    def __init__(self, device: torch.device, seconds: float = 0.3, most: int = 100, least: int = 7) -> None:
        self.device, self.seconds, self.most, self.least = device, seconds, most, least
        self._flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.int8, device=device)

    def measure(self, run: Callable[[Any], object], prepare: Callable[[int], Any]) -> Timing:
        """Times run(prepare(n)) for n = 0, 1, ...; prepare is not timed. Warms up first."""
        for number in range(3 if self.device.type == "cuda" else 1):
            estimate = self._once(run, prepare, number, 1)[0][0]
        count = min(self.most, max(self.least, round(1e3 * self.seconds / max(estimate, 1e-6))))
        times, host = zip(*self._once(run, prepare, 0, count), strict=True)
        low, median, high = statistics.quantiles(times, n=4) if count > 1 else times * 3
        return Timing(median, low, high, count, statistics.median(host))

    def _once(
        self, run: Callable[[Any], object], prepare: Callable[[int], Any], first: int, count: int
    ) -> list[tuple[float, float]]:
        """Milliseconds of the device and of the host of each of `count` calls."""
        on_gpu = self.device.type == "cuda"
        host, events = [], []
        for number in range(first, first + count):
            prepared = prepare(number)
            if on_gpu:
                begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                events.append((begin_event, end_event))
                self._flush.zero_()
                torch.cuda._sleep(WAIT_CYCLES)
                begin_event.record()
            begin = time.perf_counter()
            run(prepared)
            host.append(1e3 * (time.perf_counter() - begin))
            if on_gpu:
                end_event.record()
        if not on_gpu:
            return list(zip(host, host, strict=True))
        torch.cuda.synchronize(self.device)
        return list(zip((begin.elapsed_time(end) for begin, end in events), host, strict=True))


def device_named(name: str) -> torch.device:
    """The device. Raises UserError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no CUDA device here: run this on a machine with a GPU.")
    return torch.device(name)


def clock_of(device: torch.device, seconds: float) -> Clock:
    """A clock that measures for `seconds`; on a CPU, where programs are only tried, one call."""
    return Clock(device, seconds) if device.type == "cuda" else Clock(device, seconds=0, most=1, least=1)


def new_results(kind: str, output: Path | None, facts: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Path of a results file, `output` or a name under results/gpu, and its head: machine and time."""
    name = f"{kind}-{'-'.join(facts['device'].lower().split())}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    return output or RESULTS / name, {"machine": facts, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def machine_limits(clock: Clock) -> dict[str, float]:
    """bf16 matrix product (TFLOP/s) and copy (GB/s, read and written bytes) of this machine, now."""
    device = clock.device
    on_gpu = device.type == "cuda"
    size = MATMUL_SIZE if on_gpu else 128
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    matmul = clock.measure(lambda _: a @ b, lambda _: None)
    source = torch.empty(COPY_BYTES if on_gpu else 2**20, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = clock.measure(lambda _: target.copy_(source), lambda _: None)
    return {
        "bf16_matmul_tflops": 2 * size**3 / matmul.median / 1e9,
        "copy_gbytes_per_second": 2 * source.numel() / copy.median / 1e6,
    }


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Facts that must be equal for two figures to stand in one table: device, driver, versions, hash of the kernels."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "kernels": kernels_hash(),
    }
    if device.type != "cuda":
        return {"device": platform.processor() or platform.machine()} | facts
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": nvidia_smi("driver_version"),
        "power_limit": nvidia_smi("power.limit"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **facts,
    }


def _triton_version() -> str | None:
    if not TRITON_INSTALLED:
        return None
    # Imported on use: what runs on a CPU without the interpreter works without Triton.
    import triton

    return str(triton.__version__)


def kernels_hash() -> str:
    """First digits of the SHA-256 of the sources of sep_attention."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "kernels" / "sep_attention").rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def nvidia_smi(field: str) -> str:
    """A field of the first GPU as nvidia-smi gives it; "unknown" where that program does not answer."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"

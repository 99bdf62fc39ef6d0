"""Self test of torch.distributed: an all-reduce of known sums, checked and timed.

    python -m sepllm_train.distributed.all_reduce --backend gloo --mebibytes 64

runs in a process that knows its place (RANK, WORLD_SIZE, ...); rank 0 prints the result as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

TIMEOUT_SECONDS = 120.0
REPEATS = 5


def measure(backend: str, mebibytes: int) -> dict[str, Any]:
    """All-reduce of that many MiB of float32 over all processes of the launch, on their GPUs for nccl.

    Gives the backend, processes, MiB, median seconds and GB/s on the wire: 2 (n - 1) / n times the bytes over the
    seconds, which compares runs of different n (the "bus bandwidth" of NVIDIA's nccl-tests). One process: no bandwidth.
    Raises RuntimeError for a wrong sum or when the processes do not meet within TIMEOUT_SECONDS.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS))
    try:
        rank, size = dist.get_rank(), dist.get_world_size()
        data = torch.empty(mebibytes * (1 << 18), dtype=torch.float32, device=device)
        seconds = []
        for _ in range(REPEATS + 1):
            data.fill_(rank + 1)
            _wait_for(device)
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(data)
            _wait_for(device)
            seconds.append(time.perf_counter() - begin)
            if not bool((data == size * (size + 1) / 2).all()):
                raise RuntimeError(f"rank {rank}: the all-reduce gave a wrong sum")
    finally:
        dist.destroy_process_group()
    # The first one sets up connections.
    median = statistics.median(seconds[1:])
    wire = 2 * (size - 1) / size * data.numel() * data.element_size() / median / 1e9
    result = {"backend": backend, "processes": size, "mebibytes": mebibytes, "seconds": median}
    return {**result, "gigabytes_per_second": wire} if size > 1 else result


def measure_here(backend: str, processes: int, mebibytes: int) -> dict[str, Any]:
    """`measure` in that many new processes on this machine; {"error": message} when it fails or takes too long."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The master is given: what a batch system or torchrun has set for this process is not for these.
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    command = [sys.executable, "-m", __spec__.name, "--backend", backend, "--mebibytes", str(mebibytes)]
    children = [
        subprocess.Popen(
            command,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        ends = [child.communicate(timeout=TIMEOUT_SECONDS) for child in children]
    except subprocess.TimeoutExpired:
        return {"backend": backend, "processes": processes, "error": f"no end within {TIMEOUT_SECONDS:.0f} s"}
    finally:
        for child in children:
            child.kill()
            child.wait()
    for child, (_, errors) in zip(children, ends, strict=True):
        if child.returncode != 0:
            last = errors.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
            return {"backend": backend, "processes": processes, "error": last[0]}
    return dict(json.loads(ends[0][0].splitlines()[-1]))


def _wait_for(device: Any) -> None:
    """Let a GPU finish."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def main() -> None:
    """Entry point of one process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("gloo", "nccl"), required=True)
    parser.add_argument("--mebibytes", type=int, default=64)
    arguments = parser.parse_args()
    result = measure(arguments.backend, arguments.mebibytes)
    if os.environ["RANK"] == "0":
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

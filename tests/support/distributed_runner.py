"""Run a function in several processes that talk over gloo, and collect what each returns."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.free_ports import free_port
from tests.support.waiting import HANG_SECONDS

REPOSITORY = Path(__file__).resolve().parents[2]


def run_ranks(
    function: Callable[..., Any], world_size: int, *, time_limit: float = HANG_SECONDS, **arguments: Any
) -> list[Any]:
    """Call `function(**arguments)` in `world_size` processes; gives what it returns on each rank.

    The processes see what torchrun would tell them (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) and no
    GPU. The function is found again by its file and name; arguments and results travel as JSON. Raises
    AssertionError with the output of the first rank to fail, or when `time_limit` seconds are over. No process
    outlives the call.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = os.environ | {
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
        }
        target = [inspect.getfile(function), function.__name__, json.dumps(arguments)]
        ranks = []
        try:
            for rank in range(world_size):
                command = [
                    sys.executable,
                    "-m",
                    "tests.support.distributed_runner",
                    *target,
                    str(folder / f"{rank}.json"),
                ]
                with open(folder / f"{rank}.log", "wb") as log:
                    ranks.append(
                        subprocess.Popen(
                            command,
                            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                        )
                    )
            _wait(ranks, time_limit, folder)
        finally:
            for process in ranks:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


def _wait(ranks: list[subprocess.Popen], time_limit: float, folder: Path) -> None:
    """Return when every rank has ended well."""
    deadline = time.monotonic() + time_limit
    while any(process.poll() is None for process in ranks):
        failed = [rank for rank, process in enumerate(ranks) if process.poll()]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for rank, process in enumerate(ranks):
        if process.poll():
            raise AssertionError(f"rank {rank} ended with code {process.returncode}:\n{_tail(folder, rank)}")
    for rank, process in enumerate(ranks):
        if process.poll() is None:
            raise AssertionError(f"rank {rank} was still running after {time_limit:g} seconds:\n{_tail(folder, rank)}")


def _tail(folder: Path, rank: int) -> str:
    """The last 6,000 characters that a rank printed."""
    return (folder / f"{rank}.log").read_text(errors="replace")[-6000:]


def _run_one(script: str, function: str, arguments: str, result: str) -> None:
    """Body of one process."""
    spec = importlib.util.spec_from_file_location("rank_script", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rank_script"] = module
    spec.loader.exec_module(module)
    value = getattr(module, function)(**json.loads(arguments))
    Path(result).write_text(json.dumps(value))


if __name__ == "__main__":
    _run_one(*sys.argv[1:])

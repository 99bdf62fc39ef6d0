"""Processes of this machine: programs that are started and ended from outside, and ranks that end with a launcher."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

# Of linux/prctl.h.
_PR_SET_PDEATHSIG = 1


@contextmanager
def logged_process(
    command: Sequence[str], log: Path, *, environment: Mapping[str, str], folder: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start `command` in a session of its own with its output in `log`; nothing of it outlives the block.

    Its children are killed too, those in sessions of their own (torchrun's ranks) included.
    """
    with open(log, "wb") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=dict(environment),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in children_of(process.pid):
                send(pid, signal.SIGKILL)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def children_of(launcher: int, containing: str = "") -> list[int]:
    """Process ids of the children of a process, of those whose command line contains a text. Linux."""
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        return [int(pid) for pid in children if containing.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except OSError:
        return []


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; False when the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def end_with_parent() -> None:
    """Let this process get SIGTERM when its parent is gone, however that ended. Linux alone has that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

"""Programs that need Triton end with one message and exit code 2 in a process that cannot import it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from records import NO_TRITON

from tests.support.waiting import HANG_SECONDS

CODE = """
import runpy, sys

sys.modules["triton"] = None  # as where it is not installed: its import raises ModuleNotFoundError
sys.argv = sys.argv[1:]
sys.path.insert(0, {folder!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("program", ["compile_gate.py", "tune.py", "gpu_correctness.py"])
def test_one_message(repository: Path, program: str) -> None:
    folder = repository / "kernels" / "benchmarks"
    command = [sys.executable, "-c", CODE.format(folder=str(folder)), str(folder / program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {NO_TRITON}\n")

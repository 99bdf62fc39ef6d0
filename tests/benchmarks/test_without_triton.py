"""Programs that need Triton end with one message and exit code 2 in a process that cannot import it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import NO_TRITON
from tests.support.waiting import HANG_SECONDS

CODE = """
import runpy, sys

sys.modules["triton"] = None  # as where it is not installed: its import raises ModuleNotFoundError
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("program", ["compile_gate", "tune", "correctness"])
def test_one_message(repository: Path, program: str) -> None:
    command = [sys.executable, "-c", CODE, f"benchmarks.attention.{program}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, cwd=repository, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {NO_TRITON}\n")

"""The benchmark programs as modules, and a way to run one as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.triton_support import with_repairs
from tests.support.waiting import HANG_SECONDS

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def program(repository: Path) -> Program:
    """Runs a program of the repository, named by its path; `interpret=True` with Triton's interpreter."""

    def run(path: str, *arguments: object, interpret: bool = False) -> subprocess.CompletedProcess[str]:
        environment = with_repairs(os.environ | {"TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "2"})
        command = [sys.executable, str(repository / path), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, env=environment)

    return run

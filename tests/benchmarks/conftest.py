"""A way to run a benchmark as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.triton_support import with_repairs
from tests.support.waiting import HANG_SECONDS

Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def program(repository: Path) -> Program:
    """Runs a module or script in the root of the repository; `interpret=True` with Triton's interpreter."""

    def run(name: str, *arguments: object, interpret: bool = False) -> subprocess.CompletedProcess[str]:
        environment = with_repairs(os.environ | {"TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "2"})
        program = [name] if name.endswith(".py") else ["-m", name]
        command = [sys.executable, *program, *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=HANG_SECONDS, env=environment, cwd=repository
        )

    return run

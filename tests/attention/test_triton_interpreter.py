"""The Triton kernels in Triton's interpreter: interpreter_cases.py, in processes that set TRITON_INTERPRET=1.

Triton decides when it is imported whether it compiles or interprets, so the other tests of this process are left alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
PARTS = {"edges": "test_edge", "masks": "test_any_mask", "behaviour": "not test_edge and not test_any_mask"}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_in_the_interpreter(part: str, repository: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-k", PARTS[part]]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, str(HERE / "interpreter_cases.py")],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]

"""Starts pytest in a process in which Triton interprets.

Triton decides when it is imported whether it compiles or interprets, so the other tests of this process are left alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.triton_support import with_repairs

HERE = Path(__file__).parent


def passes_in_the_interpreter(file: str, part: str = "") -> None:
    """Run the tests of `file`, those that the expression `part` chooses: all must pass, none may be skipped."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-k", part, str(HERE / file)],
        cwd=HERE.parents[1],
        env=with_repairs(environment),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout, done.stdout[-2000:]

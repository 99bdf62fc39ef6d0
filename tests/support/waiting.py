"""Waiting for other processes. Tests wait for events; no test asserts how soon one comes, which depends on the load."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable

# After so long a test that waits is taken to hang and fails: many times what the slowest takes on an idle machine.
# Continuous integration, whose machine does nothing else, sets less.
HANG_SECONDS = float(os.environ.get("SEPLLM_TEST_PATIENCE", "1800"))


def wait_until(condition: Callable[[], object], what: str, process: subprocess.Popen | None = None) -> None:
    """Return once `condition` is true.

    Raises AssertionError, which names `what`, when `process` ends before, or after HANG_SECONDS.
    """
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        ended = process is not None and process.poll() is not None
        assert not ended or condition(), f"the process ended before: {what}"
        assert time.monotonic() < deadline, f"not within {HANG_SECONDS:g} seconds: {what}"
        time.sleep(0.02)

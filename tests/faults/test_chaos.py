"""A few random disturbances of a run, as `make chaos` does many."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.processes import REPOSITORY
from tests.waiting import HANG_SECONDS


@pytest.mark.slow
@pytest.mark.distributed
def test_five_kills_end_bitwise_alike(sample_cache: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "scripts" / "chaos.py"), "--kills=5", "--steps=60"]
    folders = [f"--folder={tmp_path}", f"--cache={sample_cache}"]
    done = subprocess.run([*command, *folders], capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 disturbances" in done.stdout and "every run ended bitwise like the undisturbed one" in done.stdout

"""A few random disturbances of a run, as `make chaos` does many."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.processes import REPOSITORY
from tests.support.waiting import HANG_SECONDS


@pytest.mark.distributed
@pytest.mark.parametrize(("kills", "steps"), [(1, 20), (5, 60)])
@pytest.mark.slow
def test_kills_end_bitwise_alike(sample_cache: Path, tmp_path: Path, kills: int, steps: int) -> None:
    command = [sys.executable, str(REPOSITORY / "scripts" / "chaos.py"), f"--kills={kills}", f"--steps={steps}"]
    folders = [f"--folder={tmp_path}", f"--cache={sample_cache}"]
    done = subprocess.run([*command, *folders], capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} disturbance" in done.stdout and "every run ended bitwise like the undisturbed one" in done.stdout

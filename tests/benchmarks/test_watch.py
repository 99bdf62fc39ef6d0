"""benchmarks/watch.py in small, its part of the server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.waiting import HANG_SECONDS


def test_figures(repository: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.watch", "--runs", "2", "--rows", "300"]
    # Without a browser on the path its part is left out.
    alone = os.environ | {"PATH": str(repository)}
    done = subprocess.run(
        [*command, "--refreshes", "2"], capture_output=True, text=True, timeout=HANG_SECONDS, env=alone, cwd=repository
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 runs of 300 training records, ")
    figures = re.findall(r"^(.*?) +median +([\d.]+) ms, p95 +([\d.]+) ms", done.stdout, flags=re.MULTILINE)
    assert [name for name, *_ in figures] == ["server, every run has new rows", "server, nothing new (304)"]
    assert "the browser's part is left out" in done.stdout
    assert all(0 < float(middle) <= float(late) for _, middle, late in figures)

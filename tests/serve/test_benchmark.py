"""scripts/benchmark_serve.py in small."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_figures(repository: Path) -> None:
    command = [sys.executable, repository / "scripts/benchmark_serve.py", "--runs", "2", "--rows", "300"]
    done = subprocess.run([*command, "--refreshes", "2"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 runs of 300 training records, ")
    figures = re.findall(r"^(.*?) +median +([\d.]+) ms, p95 +([\d.]+) ms", done.stdout, flags=re.MULTILINE)
    assert [name for name, *_ in figures][:2] == ["server, every run has new rows", "server, nothing new (304)"]
    assert all(0 < float(middle) <= float(late) for _, middle, late in figures)

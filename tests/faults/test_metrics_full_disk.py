"""metrics.jsonl on a disk that is full for a while: training goes on, nothing is torn, nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.faults.processes import REPOSITORY

# A limit on the size of files makes write fail in the middle of a record, as a full disk does.
WRITER = """
import resource, sys
from pathlib import Path
from sepllm_train.metrics.log import MetricsLog

log = MetricsLog(Path(sys.argv[1]))
for step in range(12):
    if step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 30, resource.RLIM_INFINITY))
    if step == 10:
        print(log.path.read_text().count("\\n"), flush=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log.write({"step": step, "text": "x" * 50})
"""


def test_full_disk_neither_stops_nor_tears(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(path)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "metrics.jsonl cannot be written (File too large): training goes on" in warnings[0]
    # While the disk was full: whole records only.
    assert done.stdout.splitlines()[-1] == "4"
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(12))

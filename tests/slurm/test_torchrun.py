"""The launcher of the batch scripts: exit codes of workers, signals, and `sepllm env` under it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from sepllm_train.base.errors import LostRank, UserError, report
from tests.support.waiting import HANG_SECONDS, wait_until

pytestmark = pytest.mark.distributed

WORKER = """
import os, signal, sys, time
signals = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: signals.append(number))
rank = int(os.environ["RANK"])
open(sys.argv[1] + f"/ready{rank}", "w").close()
if sys.argv[2] == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
while {signal.SIGUSR1, signal.SIGTERM} - set(signals):
    # A rank that lost another one is ended by SIGTERM.
    if sys.argv[2] == "killed" and signal.SIGTERM in signals:
        sys.exit(1)
    time.sleep(0.05)
sys.exit(75)
"""


def launch(folder: Path, what: str) -> subprocess.Popen[str]:
    """Two workers under the launcher."""
    (folder / "worker.py").write_text(WORKER)
    launcher = [sys.executable, "-m", "sepllm_train.distributed.torchrun", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*launcher, "worker.py", str(folder), what],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_signals_reach_the_workers_and_their_exit_code_comes_back(tmp_path: Path) -> None:
    """As Slurm sends them: to every process, again and again, also before the workers listen."""
    process = launch(tmp_path, "signalled")
    # From here on the launcher is deaf: /proc says so.
    wait_until(lambda: ignored(process.pid, signal.SIGUSR1), "the launcher ignores SIGUSR1", process)
    deadline = time.monotonic() + HANG_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        listening = all((tmp_path / f"ready{rank}").exists() for rank in range(2))
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(process.pid)
            for one in [launcher, *launcher.children(recursive=True)]:
                one.send_signal(signal.SIGTERM if listening else signal.SIGUSR1)
                one.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
    assert process.wait(1) == 75
    assert process.stderr is not None and "Traceback" not in process.stderr.read()


def ignored(pid: int, number: int) -> bool:
    """Whether a process ignores a signal."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigIgn:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    process = launch(tmp_path, "killed")
    _, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 128 + signal.SIGKILL
    assert errors.splitlines()[-1].startswith("error: rank 1 on ") and "was killed by SIGKILL." in errors


def test_nodes_that_do_not_meet(tmp_path: Path) -> None:
    """One of two nodes alone."""
    options = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-conf=join_timeout=1"]
    command = [sys.executable, "-m", "sepllm_train.distributed.torchrun", *options, "worker.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 1
    assert "has no contact with the other nodes of the run" in done.stderr.splitlines()[-1]


def test_the_report_measures_the_launch(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "sepllm_train.distributed.torchrun", "--standalone", "--nproc-per-node=2"]
    script = ["-m", "sepllm_train", "env", "--json", "--mebibytes=1"]
    done = subprocess.run(
        [*launcher, *script], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS, check=True
    )
    report = json.loads(done.stdout)
    assert report["variables"]["WORLD_SIZE"] == "2"
    (test,) = report["self_test"].values()
    assert test["processes"] == 2 and test["gigabytes_per_second"] > 0


MISTAKE = ["-m", "sepllm_train", "pretrain", "+experiment=demo_sep", "+training.stepz=3"]


@pytest.mark.parametrize(("module", "code"), [("sepllm_train.distributed.torchrun", 2), ("torch.distributed.run", 1)])
def test_the_sentence_comes_last(module: str, code: int, tmp_path: Path) -> None:
    """With the launcher it is all there is; torchrun's own report ends with it."""
    launcher = [sys.executable, "-m", module, "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, *MISTAKE], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    assert done.returncode == code
    last = done.stderr.strip().splitlines()[-3:] if code == 1 else done.stderr.strip().splitlines()[-1:]
    assert any("error: configuration: there is no key training.stepz" in line for line in last), done.stderr
    assert code == 1 or "exitcode" not in done.stderr


def test_of_several_lines_torchruns_report_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert report(UserError("two settings do not fit:\n- a\n- b")) == 2
    assert ProcessFailure(0, 1, 2, str(file)).message["extraInfo"]["py_callstack"] == (
        "error: two settings do not fit: - a - b"
    )
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere" / "error.json"))
    assert report(LostRank("a rank is gone")) == 4

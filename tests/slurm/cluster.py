"""A real Slurm of two nodes on one machine: munged, slurmctld and two slurmd with all their files in one folder."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.free_ports import free_port
from tests.support.waiting import HANG_SECONDS

NODES = 2
# Where the daemons live so long without a cluster that works, the tests skip.
START_SECONDS = 180.0
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
# cred_expire is also what a requeued job waits; 5 s is the least. More CPUs than the machine has, so that jobs run side
# by side.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=10
MessageTimeout=20
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def why_not() -> str | None:
    """Why no Slurm can be started here; None where it can."""
    if os.geteuid() != 0:
        return "starting Slurm needs root"
    missing = [program for program in PROGRAMS if _find(program) is None]
    return f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)" if missing else None


class Cluster:
    """Daemons of a Slurm in `folder`; its jobs are those of the tests."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder = folder
        self.repository = repository
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SEPLLM"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "SEPLLM_CHECKOUT": str(repository),
            "SEPLLM_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the daemons; skips the test where they do not come up."""
        host = socket.gethostname().split(".")[0]
        ports = [free_port() for _ in range(NODES + 1)]
        nodes = "\n".join(
            f"NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[number]} CPUs=8 State=UNKNOWN"
            for number in range(1, NODES + 1)
        )
        text = CONFIGURATION.format(host=host, controller=ports[0], folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(128))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._spawn("munged", "--foreground", *(f"--{name}={self.folder}/munge.{end}" for name, end in files.items()))
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._spawn("slurmctld", "-D", "-c")
        for number in range(1, NODES + 1):
            self._spawn("slurmd", "-D", "-N", f"node{number}")
        self._until(lambda: self._idle_nodes() == NODES, "Slurm")

    def stop(self) -> None:
        """End all jobs, then the daemons."""
        if (self.folder / "slurm.conf").exists():
            self.call("scancel", "--user=root", check=False)
            deadline = time.monotonic() + HANG_SECONDS
            while self.call("squeue", "--noheader", check=False) and time.monotonic() < deadline:
                time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait(HANG_SECONDS)

    def call(self, program: str, *arguments: str, check: bool = True) -> str:
        """Run one of Slurm's programs and give what it prints."""
        done = subprocess.run(
            [str(_find(program)), *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{program} {arguments}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """sbatch of a script of scripts/slurm; gives the job's number."""
        path = str(self.repository / "scripts" / "slurm" / script)
        before, self.environment = self.environment, {**self.environment, **environment}
        try:
            return self.call("sbatch", "--parsable", *options, path, *arguments)
        finally:
            self.environment = before

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job (of a task: 7_1), by the names of `scontrol show job`."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "--oneliner", "show", "job", job)))

    def wait(self, job: str) -> dict[str, str]:
        """Wait until a job is over, requeued attempts included."""

        def over() -> bool:
            return self.job(job)["JobState"] in FINAL_STATES

        self.until(over, job)
        return self.job(job)

    def until(self, condition: Callable[[], Any], job: str) -> None:
        """Wait for a condition; fails with the job's output when it does not come about in time."""
        deadline = time.monotonic() + HANG_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{self.job(job)}\n{self.output(job)[-4000:]}"
            time.sleep(0.1)

    def output(self, job: str) -> str:
        """What the job (or task) has printed in all its attempts."""
        (file,) = self.folder.glob(f"*-{job}.out")
        return file.read_text()

    def _spawn(self, program: str, *arguments: str) -> None:
        log = (self.folder / f"{program}.stderr").open("ab")
        self._daemons.append(
            subprocess.Popen([str(_find(program)), *arguments], env=self.environment, stdout=log, stderr=log)
        )

    def _idle_nodes(self) -> int:
        return self.call("sinfo", "--noheader", "--Node", "--format=%t", check=False).split().count("idle")

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                logs = [*self.folder.glob("*.log"), *self.folder.glob("*.stderr")]
                told = " / ".join(
                    line for log in logs for line in log.read_text().splitlines() if "error" in line.lower()
                )
                pytest.skip(f"{what} does not start here: {told[-400:]}")
            time.sleep(0.1)


def records(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run, also while it is written; nothing where there is none yet."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _find(program: str) -> str | None:
    """Path of a program; the daemons are outside of an ordinary user's path."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")

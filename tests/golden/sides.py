"""The two sides of a comparison: a revision in a git worktree and the working tree, each in processes of its own."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from sepllm_train.requirements import read_setup, unmet
from tests.golden.archives import FILES
from tests.golden.cases import Case

REPOSITORY = Path(__file__).resolve().parents[2]
SIDE = Path(__file__).with_name("side.py")
# A case takes seconds on an idle machine.
PATIENCE_SECONDS = 900.0
# Variables of the shell that would change what a case computes or where it looks.
_DROPPED = ("SEPLLM_", "PYTHON", "HYDRA_", "TORCHELASTIC_", "WANDB_")
_LAUNCH = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


class BadInput(Exception):
    """A mistake of the caller, as one sentence."""


@dataclass
class Processes:
    """The processes that are running, so that all can be ended at once."""

    running: dict[int, subprocess.Popen[str]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: bool = False

    def run(self, command: list[str], folder: Path, environment: dict[str, str], log: Path) -> int:
        """Run a command to its end and return its code; -1 when it took longer than PATIENCE_SECONDS."""
        with open(log, "w", encoding="utf8") as output:
            with self.lock:
                if self.stopped:
                    return -1
                process = subprocess.Popen(
                    command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True, text=True,
                )  # fmt: skip
                self.running[process.pid] = process
            try:
                return process.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                print(f"warning: ended after {PATIENCE_SECONDS:.0f} s: {log.stem}", file=sys.stderr, flush=True)
                end(process)
                return -1
            finally:
                with self.lock:
                    self.running.pop(process.pid)

    def stop(self) -> None:
        """End everything that runs; nothing is started any more."""
        with self.lock:
            self.stopped = True
            processes = list(self.running.values())
        for process in processes:
            end(process)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and its descendants: torchrun gives its ranks sessions of their own."""
    try:
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for one in family:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue


@dataclass
class Side:
    """One side. `folder` is where its cases run; `outcomes` are those that are known, by case: {"outcome": ...} or
    {"error": ...}."""

    name: str
    tree: Path
    folder: Path
    processes: Processes
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    futures: dict[str, Future[None]] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """Environment of a case: this tree's code, one thread a process, nothing from the network, no GPU."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(_DROPPED) and k not in _LAUNCH}
        return kept | {
            "PYTHONPATH": os.pathsep.join([str(self.tree), str(self.tree / "kernels")]),
            "PYTHONSAFEPATH": "1",
            "SEPLLM_CACHE": str(self.folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }

    def run(self, case: Case) -> None:
        """Run a case after the cases it needs, and keep its outcome."""
        for need in case.needs:
            self.futures[need].result()
            if "error" in self.outcomes[need]:
                self.outcomes[case.name] = {"error": f"{need} failed, which it needs"}
                return
        job, result, log = (self.folder / f"{case.name}.{suffix}" for suffix in ("job.json", "json", "log"))
        job.write_text(json.dumps(case.job), encoding="utf8")
        command = [sys.executable]
        if case.ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
        command += [str(path) for path in (SIDE, self.tree, job, result)]
        code = self.processes.run(command, self.folder, self.environment(), log)
        if code == 0 and result.is_file():
            self.outcomes[case.name] = {"outcome": json.loads(result.read_text(encoding="utf8"))}
        else:
            self.outcomes[case.name] = {"error": f"exit code {code}: {last_line(log)}"}


def last_line(log: Path) -> str:
    """The last line of a log that says what happened."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # torchrun's block comes after what the ranks print.
    told = [line for line in lines if "Error: " in line or line.startswith("error: ")]
    return (told or lines or ["nothing was printed"])[-1]


def commit_of(revision: str) -> str:
    """The full name of a commit of this repository. Raises BadInput."""
    if not (REPOSITORY / ".git").exists():
        raise BadInput(f"{REPOSITORY} is not a git checkout, and the reference is one of its revisions: clone it.")
    found = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if found.returncode == 0:
        return found.stdout.strip()
    if git("rev-parse", "--is-shallow-repository").stdout.strip() == "true":
        raise BadInput(f"this clone is shallow and lacks the revision {revision}: git fetch --unshallow brings it.")
    raise BadInput(f"--reference {revision} is not a revision of {REPOSITORY}.")


def check_versions(commit: str) -> None:
    """Raise BadInput where a commit is not made for the megatron-core or the torch of this environment."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "setup.py"
        file.write_text(git("show", f"{commit}:setup.py").stdout, encoding="utf8")
        wanted = [line for line in read_setup(file).packages if line.startswith(("torch", "megatron-core"))]
    missed = unmet(wanted)
    if missed:
        raise BadInput(
            f"{commit[:7]} does not run here: {missed[0].name} {missed[0].installed} is not {missed[0].wanted}. "
            "Both sides need one environment: for b31b21f make it with Python 3.11 (make clean, then "
            "make PYTHON=python3.11 golden)."
        )


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """A git worktree of a commit at `folder`, removed at the end of the block whatever happens. Raises BadInput."""
    try:
        made = git("-c", "core.hooksPath=/dev/null", "worktree", "add", "--quiet", "--detach", str(folder), commit)
        if made.returncode:
            raise BadInput(f"git cannot make a worktree of {commit[:7]}: {made.stderr.strip().splitlines()[-1]}.")
        yield folder
    finally:
        git("worktree", "remove", "--force", "--force", str(folder))


def git(*words: str) -> subprocess.CompletedProcess[str]:
    """Run git in this repository. A session of its own: Ctrl-C must not stop the removal of a worktree."""
    return subprocess.run(
        ["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=False, start_new_session=True
    )


def fingerprint(commit: str) -> dict[str, str]:
    """Everything that the outcomes of the reference depend on: commit, packages, processor, cases."""
    packages = sorted({f"{one.name}=={one.version}" for one in metadata.distributions()})
    files = sorted([*SIDE.parent.glob("*.py"), FILES / "data.tar.gz"])
    own = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files if not path.name.startswith("test_"))
    return {
        "commit": commit,
        "checkout": str(REPOSITORY),
        "python": platform.python_version(),
        "packages": sha256("\n".join(packages)),
        "processor": processor(),
        "cases": sha256(own),
    }


def processor() -> str:
    """Model of the processor and a hash of its instruction sets, which choose the kernels of matrix products."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{facts.get('model name', platform.machine())} {sha256(facts.get('flags', ''))[:8]}"


def sha256(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()

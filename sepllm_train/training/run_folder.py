"""RUN/: config.yaml, environment.json, run.json, metrics.jsonl and checkpoints/, and how a run may enter it."""

from __future__ import annotations

import fcntl
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import OmegaConf

from data_prep.files import write_whole
from sepllm_train.config.schema import Config
from sepllm_train.errors import UserError
from sepllm_train.training import checkpoint

PACKAGES = ("torch", "megatron-core", "triton", "flash-attn", "transformer-engine", "apex", "numpy", "sepllm-train")


@dataclass(frozen=True)
class Entry:
    """How this run begins: from `checkpoint` (None = from scratch), in a folder that it may write."""

    folder: Path
    checkpoint: Path | None


def enter(config: Config, identity: dict[str, Any], schedule: dict[str, Any]) -> Entry:
    """Decide what `resume` means here and check it. Touches nothing.

    Raises UserError for a folder that holds a finished run, or another run than this one.
    """
    folder = Path(config.run_root) / config.name
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: the run needs a folder of that name, choose another name=.")
    used = (folder / "metrics.jsonl").exists()
    earlier = read_run(folder)
    if used and earlier.get("status") == "finished":
        raise UserError(f"{folder} holds a finished run: choose another name=, or delete it to train again.")
    if config.resume == "never" and used:
        raise UserError(f"{folder} is in use by an earlier run: choose another name=, or resume=auto to continue it.")
    if config.resume in ("auto", "never"):
        found = checkpoint.newest(folder) if config.resume == "auto" else None
    else:
        found = checkpoint.find(config.resume)
        if used and found != checkpoint.newest(folder):
            raise UserError(f"{folder} is in use by an earlier run: give the run that continues {found} another name=.")
    if used and found is None and "identity" in earlier:
        # A run that was stopped before its first checkpoint starts again, but not as another run.
        remedy = "choose another name=, or delete it"
        checkpoint.check_identity(earlier["identity"], identity, str(folder), remedy)
        checkpoint.check_identity(earlier["schedule"], schedule, str(folder), remedy)
    if found is not None:
        content = checkpoint.read_state(found)
        checkpoint.check_identity(content["identity"], identity, str(found), "a run continues with what it began with")
        if used:
            checkpoint.check_identity(
                content["schedule"], schedule, str(found), f"continue under another name with resume={folder} name=NEW"
            )
        if content["state"]["step"] >= config.training.steps:
            raise UserError(
                f"{found} is at step {content['state']['step']}, nothing is left of training.steps="
                f"{config.training.steps}: give more steps, or start a new run."
            )
    return Entry(folder, found)


def read_run(folder: Path) -> dict[str, Any]:
    """run.json, or nothing where there is none that can be read."""
    try:
        return dict(json.loads((folder / "run.json").read_text(encoding="utf8")))
    except (OSError, ValueError):
        return {}


def claim(folder: Path) -> IO[str]:
    """Make the run's folder and lock it until the file that is returned is closed.

    Raises UserError when it cannot be written, or another process trains there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115  held for as long as the run
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another run_root=.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process is training in {folder}: wait for it, or choose another name=.") from None
    return lock


def describe(folder: Path, config: Config, run: dict[str, Any]) -> None:
    """Write config.yaml, environment.json and run.json (status: running)."""
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
    write_whole(folder / "environment.json", json.dumps(environment(), indent=2).encode())
    write_run(folder, {**run, "status": "running"})


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Write run.json."""
    write_whole(folder / "run.json", (json.dumps(run, indent=2) + "\n").encode())


def environment() -> dict[str, Any]:
    """Code, packages, machine and command of this run."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": _git_state(),
        "python": platform.python_version(),
        "packages": versions,
        "host": platform.node(),
        "processor": platform.processor() or platform.machine(),
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this code runs from and whether it has changes; None outside a checkout."""
    source = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(source), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None

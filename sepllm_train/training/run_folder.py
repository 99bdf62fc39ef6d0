"""RUN/: config.yaml, environment.json, run.json, metrics.jsonl and checkpoints/, and how a run may enter it."""

from __future__ import annotations

import fcntl
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import OmegaConf

from data_prep.files import write_whole
from sepllm_train.config.schema import Config
from sepllm_train.console import say
from sepllm_train.distributed.together import agree, together
from sepllm_train.errors import UserError
from sepllm_train.training import checkpoint

PACKAGES = ("torch", "megatron-core", "triton", "flash-attn", "transformer-engine", "apex", "numpy", "sepllm-train")


@dataclass(frozen=True)
class Entry:
    """How this run begins: from `checkpoint` (None = from scratch), in a folder that it may write.

    `step` is the checkpoint's (0 from scratch), and `skipped` names newer checkpoints that are damaged, each with the
    reason.
    """

    folder: Path
    checkpoint: Path | None
    step: int
    skipped: dict[Path, str]


def settle(config: Config, identity: dict[str, Any], schedule: dict[str, Any]) -> Entry:
    """Decide on every rank together how this run begins, from a checkpoint whose every byte is what was written.

    Raises UserError on all ranks for what `enter` does, for a damaged checkpoint that `resume` names, and when the
    nodes see different data or checkpoints.
    """
    damaged: dict[Path, str] = {}
    while True:
        entry = together(partial(enter, config, identity, schedule, damaged))
        agree(
            (identity, str(entry.checkpoint)),
            f"the nodes see different data or checkpoints: data and run_root={config.run_root} must be on a filesystem "
            "that all of them share.",
        )
        reason = None if entry.checkpoint is None else checkpoint.altered_together(entry.checkpoint)
        if entry.checkpoint is None or reason is None:
            return entry
        damaged = {**entry.skipped, entry.checkpoint: reason}


def enter(
    config: Config, identity: dict[str, Any], schedule: dict[str, Any], damaged: dict[Path, str] | None = None
) -> Entry:
    """Decide what `resume` means here and check it. Touches nothing. `damaged` checkpoints are left out.

    Raises UserError for a folder that holds a finished run, or another run than this one.
    """
    skipped = dict(damaged or {})
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
        found = checkpoint.newest(folder, skipped) if config.resume == "auto" else None
        if found is None:
            checkpoint.refuse_if_all_damaged(skipped, str(folder))
    else:
        found = checkpoint.find(config.resume, skipped)
        own = checkpoint.newest(folder, dict(skipped))
        if used and own is not None and found.resolve() != own.resolve():
            raise UserError(f"{folder} is in use by an earlier run: give the run that continues {found} another name=.")
    in_place = used and found is not None and found.resolve().parent.parent == folder.resolve()
    if used and not in_place and "identity" in earlier:
        # A run that was stopped before its first checkpoint starts again, but not as another run.
        remedy = "choose another name=, or delete it"
        checkpoint.check_identity(earlier["identity"], identity, str(folder), remedy)
        checkpoint.check_identity(earlier["schedule"], schedule, str(folder), remedy)
    step = 0
    if found is not None:
        content = checkpoint.read_state(found)
        step = content["state"]["step"]
        checkpoint.check_identity(content["identity"], identity, str(found), "a run continues with what it began with")
        if in_place:
            checkpoint.check_identity(
                content["schedule"], schedule, str(found), f"continue under another name with resume={folder} name=NEW"
            )
        # A run that was killed after its last checkpoint is continued, if only to be called finished.
        if step >= config.training.steps and not in_place:
            raise UserError(
                f"{found} is at step {step}, nothing is left of training.steps={config.training.steps}: give more "
                "steps, or start a new run."
            )
    return Entry(folder, found, step, skipped)


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


def tidy(entry: Entry) -> None:
    """Say which checkpoints were skipped and make the folder ready to go on: half-written folders of a killed run go,
    damaged checkpoints get another name."""
    for path, reason in entry.skipped.items():
        say(f"skipped the damaged checkpoint {path}: {reason}")
    for renamed in checkpoint.tidy(entry.folder, entry.step):
        say(f"kept aside, its step is trained again: {renamed}")


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

"""RUN/: config.yaml, environment.json, run.json, metrics.jsonl and checkpoints/, and how a run may enter it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import locked, write_whole
from sepllm_train.config.schema import Config
from sepllm_train.distributed.collectives import agree, together
from sepllm_train.training import checkpoint

PACKAGES = ("torch", "megatron-core", "triton", "flash-attn", "transformer-engine", "apex", "numpy", "sepllm-train")

# Seconds until a file of another node must be seen. NFS shows it as soon as its folder is listed.
_SEEN_WITHIN = 30.0


@dataclass(frozen=True)
class Entry:
    """How this run begins: from `checkpoint` (None = from scratch), in a folder that it may write.

    `step` is the checkpoint's (0 from scratch), and `skipped` names newer checkpoints that are damaged, each with the
    reason. `origin` is the absolute path of the resume=PATH that the folder's run began with, and `content` tells
    whether another run has been in the folder since. `earlier_data`: see `checkpoint.earlier_data`.
    """

    folder: Path
    checkpoint: Path | None
    step: int
    skipped: dict[Path, str]
    origin: str | None
    content: Any
    earlier_data: list[dict[str, Any]]


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


def settle_anew(config: Config, identity: dict[str, Any], schedule: dict[str, Any], entry: Entry) -> Entry:
    """`entry`, once the folder is claimed; decided anew if another run has been there since `settle` looked.

    Every rank calls it. Raises UserError as `settle` does.
    """
    changed = [_content(entry.folder) != entry.content]
    dist.broadcast_object_list(changed, src=0)
    return settle(config, identity, schedule) if changed[0] else entry


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
    content = _content(folder)
    earlier = read_run_json(folder)
    asked = None if config.resume in ("auto", "never") else str(Path(config.resume).expanduser().resolve())
    if used and earlier.get("status") == "finished":
        raise UserError(f"{folder} holds a finished run: choose another name=, or delete it to train again.")
    if config.resume == "never" and used:
        raise UserError(f"{folder} is in use by an earlier run: choose another name=, or resume=auto to continue it.")
    if config.resume in ("auto", "never"):
        found = checkpoint.newest(folder, skipped) if config.resume == "auto" else None
        if found is None:
            checkpoint.refuse_if_all_damaged(skipped, str(folder))
    elif used and earlier.get("origin") == asked and checkpoint.checkpoints_of(folder):
        # The command that began this run is given again, as schedulers do: it means to go on.
        found = checkpoint.newest(folder, skipped)
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
    step, earlier_data = 0, []
    if found is not None:
        stored = checkpoint.read_state(found)
        step = stored["state"]["step"]
        other_data = config.resume_other_data and not in_place
        checkpoint.check_identity(
            stored["identity"],
            identity,
            str(found),
            "a run continues with what it began with",
            other_data=other_data,
            data_remedy="" if in_place else ", or on purpose with other data by resume_other_data=true",
        )
        if other_data:
            checkpoint.check_unseen(stored["identity"], identity, str(found))
        earlier_data = checkpoint.earlier_data(stored["identity"], identity)
        if in_place:
            checkpoint.check_identity(
                stored["schedule"], schedule, str(found), f"continue under another name with resume={folder} name=NEW"
            )
        # A run that was killed after its last checkpoint is continued, if only to be called finished.
        if step >= config.training.steps and not in_place:
            raise UserError(
                f"{found} is at step {step}, nothing is left of training.steps={config.training.steps}: give more "
                "steps, or start a new run."
            )
    origin = (earlier.get("origin") if in_place else None) or asked
    return Entry(folder, found, step, skipped, origin, content, earlier_data)


def _content(folder: Path) -> Any:
    """What changes when a run begins or ends in `folder` or writes a checkpoint there; equal when none did."""
    checkpoints = folder / checkpoint.FOLDER
    try:
        # Listing makes a network filesystem look anew.
        return read_run_json(folder), sorted(os.listdir(checkpoints)), checkpoints.stat().st_mtime_ns
    except OSError:
        return read_run_json(folder), [], 0


def read_run_json(folder: Path) -> dict[str, Any]:
    """run.json, or nothing where there is none that can be read."""
    return _read_object(folder / "run.json")


def read_environment(folder: Path) -> dict[str, Any]:
    """environment.json, or nothing where there is none that can be read."""
    return _read_object(folder / "environment.json")


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or nothing where there is none that can be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf8")))
    except (OSError, ValueError):
        return {}


def claim(folder: Path) -> IO[str]:
    """Make the run's folder and lock it until the file that is returned is closed.

    The lock is this process's alone: data workers that outlive it do not keep it. Opening the file once more in this
    process and closing it would give the lock up. Raises UserError when the folder cannot be written, or another
    process trains there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115  held for as long as the run
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another run_root=.") from None
    if not locked(lambda: fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB), Path(lock.name)):
        lock.close()
        raise UserError(f"another process is training in {folder}: wait for it, or choose another name=.")
    return lock


def check_shared(folder: Path) -> None:
    """Check that every rank sees a file that rank 0 writes into the run's folder. Every rank calls it.

    Raises UserError on all ranks when one does not: its part of each checkpoint would stay on its own node.
    """
    name = [f".seen_{secrets.token_hex(4)}"]
    dist.broadcast_object_list(name, src=0)
    mark = folder / name[0]
    try:
        together(lambda: _make(mark) if dist.get_rank() == 0 else None)
        together(lambda: await_file(mark, _SEEN_WITHIN))
    finally:
        if dist.get_rank() == 0:
            mark.unlink(missing_ok=True)


def _make(mark: Path) -> None:
    """Make an empty file. Raises UserError when that fails."""
    try:
        mark.touch()
    except OSError as error:
        raise UserError(f"cannot write to {mark.parent} ({error.strerror}): choose another run_root=.") from None


def await_file(mark: Path, seconds: float) -> None:
    """Wait until this process sees the file `mark`. Raises UserError when it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not _listed(mark):
        if time.monotonic() > end:
            raise UserError(
                f"a file that rank 0 wrote to {mark.parent} is not seen on {platform.node()}: run_root must be on a "
                "filesystem that all nodes share."
            )
        time.sleep(0.2)


def _listed(mark: Path) -> bool:
    """Whether `mark` is there. Listing the folders makes a network filesystem look anew."""
    try:
        os.listdir(mark.parent.parent)
        return mark.name in os.listdir(mark.parent)
    except OSError:
        return False


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
        "git": git_state(),
        "python": platform.python_version(),
        "packages": versions,
        "host": platform.node(),
        "processor": platform.processor() or platform.machine(),
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this code runs from and whether its tracked files have changes.

    None outside a checkout.
    """
    source = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(source), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return None

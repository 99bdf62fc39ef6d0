"""RUN/: config.yaml, environment.json, run.json, metrics.jsonl and checkpoints/, and how a run may enter it."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import IO, Any

import torch
import torch.distributed as dist

from sepllm_train.base.console import fold, say
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import locked, write_json, write_whole
from sepllm_train.base.parsing import read_json, read_json_if_any
from sepllm_train.base.secrets import masked, masked_words
from sepllm_train.base.shapes import require_shape
from sepllm_train.config.compatibility import EARLIER_DATA, LATEST_BLEND_ORDER, with_current_keys
from sepllm_train.config.present import finished_advice, refuse_weights_alone
from sepllm_train.config.schema import Config
from sepllm_train.config.stored import to_yaml
from sepllm_train.distributed.collectives import on_all_ranks, require_equal
from sepllm_train.metrics.log import MetricsLog
from sepllm_train.training import checkpoint

PACKAGES = ("torch", "megatron-core", "triton", "flash-attn", "transformer-engine", "apex", "numpy", "sepllm-train")

# Its records: of steps, and of steps that were left out.
LOGS = ("metrics.jsonl", "bad_steps.jsonl")
# What a run that enters its folder again reads of run.json; imported models have less.
_RUN_SHAPE = {
    "status?": str,
    "origin?": (str, NoneType),
    "identity?": checkpoint.IDENTITY_SHAPE,
    "schedule?": dict,
    "initial_weights?": (dict, NoneType),
}
# Seconds until a file of another node must be seen. NFS shows it as soon as its folder is listed.
_SEEN_WITHIN = 30.0


@dataclass(frozen=True)
class Entry:
    """Start of this run: from `checkpoint` (None = from scratch), in a folder that it may write.

    `step` is the checkpoint's (0 from scratch), and `skipped` names newer checkpoints that are damaged, each with the
    reason. `origin` is the absolute path of the resume=PATH that the folder's run began with, and `content` differs
    when another run has been in the folder since. `earlier_data`, `blend_order`: see the functions of `checkpoint`.
    """

    folder: Path
    checkpoint: Path | None
    step: int
    skipped: dict[Path, str]
    origin: str | None
    content: Any
    earlier_data: list[dict[str, Any]]
    blend_order: int


def settle(config: Config, identity: dict[str, Any], schedule: dict[str, Any]) -> Entry:
    """Decide on all ranks at once how this run begins, from a checkpoint whose every byte is what was written.

    Raises UserError on all ranks for what `enter` does, for a damaged checkpoint that `resume` names, and when the
    nodes see different data or checkpoints.
    """
    damaged: dict[Path, str] = {}
    while True:
        entry = on_all_ranks(partial(enter, config, identity, schedule, damaged))
        require_equal(
            (identity, str(entry.checkpoint)),
            f"the nodes see different data or checkpoints: data and run_root={config.run_root} must be on a filesystem "
            "that all of them share.",
        )
        reason = None if entry.checkpoint is None else checkpoint.altered_on_any_rank(entry.checkpoint)
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


# States of a run folder: never trained in, with records of a run that did not finish, with a finished run.
_UNUSED, _USED, _FINISHED = "unused", "used", "finished"
# Values of `resume`: two words, any PATH, and the PATH that the folder's run began with.
_AUTO, _NEVER, _PATH, _ITS_ORIGIN = "auto", "never", "PATH", "its origin"


@dataclass(frozen=True)
class _Visit:
    """A command that asks for a run folder: `origin`, the absolute path of its resume=PATH, `earlier`, what run.json
    has of the run before, and `skipped`, damaged checkpoints with the reason."""

    folder: Path
    resume: str
    origin: str | None
    earlier: dict[str, Any]
    used: bool
    skipped: dict[Path, str]

    @property
    def state(self) -> str:
        """State of the folder."""
        if not self.used:
            return _UNUSED
        return _FINISHED if self.earlier.get("status") == "finished" else _USED

    @property
    def asked(self) -> str:
        """Kind of `resume`."""
        if self.origin is None:
            return self.resume
        # Schedulers give the command that began this run again, to continue it.
        again = self.used and self.earlier.get("origin") == self.origin and checkpoint.checkpoints_of(self.folder)
        return _ITS_ORIGIN if again else _PATH

    def newest_own(self) -> Path | None:
        """The folder's newest whole checkpoint; None without any. Raises UserError when all are damaged."""
        found = checkpoint.newest(self.folder, self.skipped)
        if found is None:
            checkpoint.refuse_if_all_damaged(self.skipped, str(self.folder))
        return found

    def scratch(self) -> None:
        """No checkpoint."""

    def named(self) -> Path:
        """The checkpoint that `resume` names, for a folder that has none of its own but this."""
        found = checkpoint.find(self.resume, self.skipped)
        own = checkpoint.newest(self.folder, dict(self.skipped)) if self.used else None
        if own is not None and found.resolve() != own.resolve():
            raise UserError(
                f"{self.folder} is in use by an earlier run: give the run that continues {found} another name=."
            )
        return found

    def refuse_used(self) -> Path | None:
        """Raise UserError."""
        raise UserError(
            f"{self.folder} is in use by an earlier run: choose another name=, or resume=auto to continue it."
        )

    def refuse_finished(self) -> Path | None:
        """Raise UserError."""
        raise UserError(f"{finished_advice(self.folder)}.")


# (resume, state of the folder) -> where the checkpoint comes from.
_ACTIONS: dict[tuple[str, str], Callable[[_Visit], Path | None]] = {
    (_AUTO, _UNUSED): _Visit.newest_own,
    (_AUTO, _USED): _Visit.newest_own,
    (_NEVER, _UNUSED): _Visit.scratch,
    (_NEVER, _USED): _Visit.refuse_used,
    (_PATH, _UNUSED): _Visit.named,
    (_PATH, _USED): _Visit.named,
    (_ITS_ORIGIN, _USED): _Visit.newest_own,
    **{(asked, _FINISHED): _Visit.refuse_finished for asked in (_AUTO, _NEVER, _PATH, _ITS_ORIGIN)},
}


def enter(
    config: Config, identity: dict[str, Any], schedule: dict[str, Any], damaged: dict[Path, str] | None = None
) -> Entry:
    """Decide what `resume` means here and check it. Touches nothing. `damaged` checkpoints are left out.

    Raises UserError for a folder that holds a finished run, or another run than this one.
    """
    folder = Path(config.run_root) / config.name
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: the run needs a folder of that name, choose another name=.")
    refuse_weights_alone(config)
    used = (folder / "metrics.jsonl").exists()
    content = _content(folder)
    origin = None if config.resume in (_AUTO, _NEVER) else str(Path(config.resume).expanduser().resolve())
    visit = _Visit(folder, config.resume, origin, read_run_json(folder), used, dict(damaged or {}))
    found = _ACTIONS[visit.asked, visit.state](visit)
    in_place = used and found is not None and found.resolve().parent.parent == folder.resolve()
    if used and not in_place and "identity" in visit.earlier:
        # A run that was stopped before its first checkpoint starts again, but not as another run.
        remedy = "choose another name=, or delete it"
        checkpoint.check_identity(visit.earlier["identity"], identity, str(folder), remedy)
        checkpoint.check_identity(visit.earlier.get("schedule", {}), schedule, str(folder), remedy)
    step, order = 0, LATEST_BLEND_ORDER
    earlier_data: list[dict[str, Any]] = []
    if found is not None:
        step, earlier_data, order = _check_checkpoint(config, found, identity, schedule, folder if in_place else None)
    kept = visit.earlier.get("origin") if in_place else None
    return Entry(folder, found, step, visit.skipped, kept or origin, content, earlier_data, order)


def free_name(config: Config) -> str:
    """The run's name with a number behind it, under which there is no folder."""
    names = (f"{config.name}_{number}" for number in itertools.count(2))
    return next(name for name in names if not (Path(config.run_root) / name).exists())


def _check_checkpoint(
    config: Config, found: Path, identity: dict[str, Any], schedule: dict[str, Any], folder: Path | None
) -> tuple[int, list[dict[str, Any]], int]:
    """Check that the run may continue from `found`, in place in `folder` or in another one (None); gives its step,
    `checkpoint.earlier_data` and `checkpoint.blend_order`. Raises UserError."""
    stored = checkpoint.read_state(found)
    step = int(stored["state"]["step"])
    other_data = config.resume_other_data and folder is None
    checkpoint.check_identity(
        stored["identity"],
        identity,
        str(found),
        "a run continues with what it began with",
        other_data=other_data,
        data_remedy="" if folder else ", or on purpose with other data by resume_other_data=true",
    )
    if other_data:
        checkpoint.check_unseen(stored["identity"], identity, str(found))
    if folder is not None:
        checkpoint.check_identity(
            stored["schedule"], schedule, str(found), f"continue under another name with resume={folder} name=NEW"
        )
    # A run that was killed after its last checkpoint is continued, if only to be called finished.
    elif step >= config.training.steps:
        raise UserError(
            f"{found} is at step {step}, nothing is left of training.steps={config.training.steps}: give more "
            "steps, or start a new run."
        )
    earlier = checkpoint.earlier_data(stored["identity"], identity)
    switched = len(earlier) > len(stored["identity"].get(EARLIER_DATA, []))
    return step, earlier, LATEST_BLEND_ORDER if switched else checkpoint.blend_order(stored["identity"], step)


def _content(folder: Path) -> Any:
    """Content of `folder` that changes when a run begins or ends there or writes a checkpoint; equal when none did."""
    checkpoints, run = folder / checkpoint.FOLDER, b""
    with contextlib.suppress(OSError):
        run = (folder / "run.json").read_bytes()
    try:
        # Listing makes a network filesystem look anew.
        return run, sorted(os.listdir(checkpoints)), checkpoints.stat().st_mtime_ns
    except OSError:
        return run, [], 0


def read_run_json(folder: Path) -> dict[str, Any]:
    """run.json, or nothing where there is none. Raises UserError for one that no run has written."""
    path, remedy = folder / "run.json", "put back a copy of it, or choose another name="
    if not path.exists():
        return {}
    found = with_current_keys(read_json(path, remedy, nan=True))
    require_shape(found, _RUN_SHAPE, path, remedy)
    return found


def read_environment(folder: Path) -> dict[str, Any]:
    """environment.json, or nothing where there is none that can be read."""
    return read_json_if_any(folder / "environment.json")


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
        on_all_ranks(lambda: _make(mark) if dist.get_rank() == 0 else None)
        on_all_ranks(lambda: await_file(mark, _SEEN_WITHIN))
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
    """True when `mark` is there. Listing the folders makes a network filesystem look anew."""
    try:
        os.listdir(mark.parent.parent)
        return mark.name in os.listdir(mark.parent)
    except OSError:
        return False


def tidy(entry: Entry) -> None:
    """Report the checkpoints that were skipped and make the folder ready to continue: half-written folders of a killed
    run go, damaged checkpoints get another name."""
    _keep_records(entry)
    for path, reason in entry.skipped.items():
        say(f"skipped the damaged checkpoint {path}: {reason}")
    for renamed in checkpoint.tidy(entry.folder, entry.step):
        say(f"kept aside, its step is trained again: {renamed}")


def _keep_records(entry: Entry) -> None:
    """Copy the logs of a run whose checkpoints are gone, with a warning: they are about to be cut to the step that it
    begins again at."""
    logs = [MetricsLog(entry.folder / name) for name in LOGS]
    last = logs[0].last_step()
    if last <= entry.step:
        return
    named = checkpoint.named_by_latest(entry.folder)
    own = entry.checkpoint is not None and entry.checkpoint.resolve().parent.parent == entry.folder.resolve()
    if own and (named is None or named.exists()):
        return
    lost = f"{named}, which its records go on from, is not there" if own else "it has no checkpoint"
    kept = [str(log.keep_copy()) for log in logs if log.path.exists()]
    say(
        fold(
            f"warning: {entry.folder} was trained to step {last}, and {lost}: the run begins again at step "
            f"{entry.step} | its records are kept in {', '.join(kept)}"
        )
    )


def describe(folder: Path, config: Config, run: dict[str, Any]) -> None:
    """Write config.yaml, environment.json and run.json (status: running)."""
    text = to_yaml(config)
    # It has to hold what was set; where that looks like a secret, nobody else may read it.
    write_whole(folder / "config.yaml", text.encode(), private=masked(text) != text)
    write_json(folder / "environment.json", environment(), indent=2, private=True)
    write_run(folder, {**run, "status": "running"})


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Write run.json."""
    write_json(folder / "run.json", run, indent=2)


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
        "command": masked_words(sys.argv),
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

"""Checkpoints as folders: which are whole, which is the newest, which are dropped.

RUN/checkpoints/step_00000100/ holds the shards, `state.json` and, written last, `manifest.json` with the size and the
SHA-256 of every other file. It is written under a name that ends in `.partial`, synced, and renamed; then
RUN/checkpoints/latest names it, and only then are older ones dropped. So whatever moment a run is killed at, each
folder with a final name was whole when it got that name, and the newest of them is newer than anything dropped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import PARTIAL, hash_file, sync_folder, write_whole
from sepllm_train.base.parsing import read_json
from sepllm_train.base.shapes import COUNT, SECONDS, Range, require_shape
from sepllm_train.config.compatibility import with_current_keys
from sepllm_train.training.checkpoint.identity import IDENTITY_SHAPE

FOLDER = "checkpoints"
LATEST = "latest"
MANIFEST = "manifest.json"
STATE = "state.json"
DAMAGED = ".damaged"
METADATA = ".metadata"
# Names of the files of tensors end so.
TENSORS = ".distcp"
# Name of a file of a checkpoint.
_FILE = re.compile(r"[\w.+-]{1,255}", re.ASCII)
_MANIFEST_SHAPE = {"files": {str: {"bytes": COUNT, "sha256": str}}}
_NUMBER = Range(-1e308, 1e308, whole=False)
_TRACKED = Range(-(1 << 31), 1 << 31)
_STATE_SHAPE = {
    "state": {
        "step": COUNT,
        "tokens": COUNT,
        "pairs": COUNT,
        "finished_pairs?": [COUNT],
        "seconds": SECONDS,
        "bad_steps": COUNT,
        "bad_in_a_row": COUNT,
        "overflows?": COUNT,
        "recent_norms": [_NUMBER],
    },
    "optimizer": {
        "step": Range(whole=False),
        "grad_scaler?": {"scale": Range(whole=False), "growth_tracker": _TRACKED, "hysteresis_tracker": _TRACKED},
    },
    "layout": {str: (COUNT, str)},
    "identity": IDENTITY_SHAPE,
    "schedule": dict,
}
_NAME = re.compile(r"step_(\d{8,})")


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint of `step`."""
    return checkpoints / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, from its name. Raises ValueError for any other folder."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not named as a checkpoint")
    return int(match[1])


def checkpoints_of(run_folder: Path) -> list[Path]:
    """Every checkpoint of a run, whole or not, oldest first."""
    folder = run_folder / FOLDER
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def newest(run_folder: Path, damaged: dict[Path, str] | None = None) -> Path | None:
    """The newest checkpoint of a run of which every file is there in full length, or None.

    `damaged` (checkpoint: reason) are left out; those found damaged on the way are added to it.
    """
    reasons = {} if damaged is None else damaged
    for checkpoint in reversed(checkpoints_of(run_folder)):
        if checkpoint in reasons:
            continue
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint
        reasons[checkpoint] = reason
    return None


def find(path: str, damaged: dict[Path, str] | None = None, key: str = "resume") -> Path:
    """The checkpoint that `resume=PATH` (or another `key`) means: its folder, or the newest whole one of a run folder.

    Raises UserError when there is none, or when the checkpoint that was named is damaged.
    """
    folder = Path(path).expanduser()
    reasons = {} if damaged is None else damaged
    if _NAME.fullmatch(folder.name) or (folder / MANIFEST).exists() or (folder / STATE).exists():
        reason = (reasons.get(folder) or damage(folder)) if folder.is_dir() else None
        if reason is not None:
            raise UserError(f"{key}={path}: the checkpoint is damaged, {reason}: name another.")
        if folder.is_dir():
            return folder
    found = newest(folder, reasons)
    if found is None:
        refuse_if_all_damaged(reasons, f"{key}={path}")
        raise UserError(
            f"{key}={path}: there is no checkpoint there; give a run folder or RUN/checkpoints/step_NNNNNNNN"
            + (", or resume=auto or never." if key == "resume" else ".")
        )
    return found


def refuse_if_all_damaged(damaged: dict[Path, str], where: str) -> None:
    """Raise UserError when checkpoints were found and none of them is whole: starting over would lose the run."""
    if damaged:
        checkpoint, reason = next(iter(damaged.items()))
        raise UserError(
            f"{where}: no checkpoint there is whole (the newest, {checkpoint}: {reason}); restore one, or choose "
            "another name= to start anew."
        )


def damage(checkpoint: Path) -> str | None:
    """Damage of a checkpoint, by the names and sizes of its files and the content of `state.json`; None when whole."""
    try:
        files = read_manifest(checkpoint)
        unlisted = next((name for name in _parts(checkpoint) if name not in files), None)
    except UserError as error:
        return str(error).rstrip(".")
    except OSError as error:
        return f"{checkpoint} cannot be read ({error.strerror})"
    if unlisted is not None:
        return f"{checkpoint / MANIFEST} does not list {unlisted}"
    for name, entry in files.items():
        try:
            status = (checkpoint / name).stat()
        except OSError:
            return f"{checkpoint / name} is missing"
        if not stat.S_ISREG(status.st_mode):
            return f"{checkpoint / name} is not a plain file"
        if status.st_size != entry["bytes"]:
            return f"{checkpoint / name} has {status.st_size} bytes, {entry['bytes']} were written"
    # The one file whose content decides how a run begins, before the others are hashed.
    return _altered(checkpoint, STATE, files[STATE])


def _parts(checkpoint: Path) -> list[str]:
    """Names of the files that make a checkpoint: those of any, and the tensors' files that are there. What else lies in
    its folder is never read."""
    return [STATE, METADATA, *sorted(name for name in os.listdir(checkpoint) if name.endswith(TENSORS))]


def altered(checkpoint: Path, part: int, parts: int) -> str | None:
    """Damage in the content of every `parts`-th file of a checkpoint from number `part` on, or None."""
    files = read_manifest(checkpoint)
    for name in sorted(files)[part::parts]:
        reason = _altered(checkpoint, name, files[name])
        if reason is not None:
            return reason
    return None


def _altered(checkpoint: Path, name: str, entry: dict[str, Any]) -> str | None:
    """Damage in the content of one file, or None."""
    try:
        if hash_file(checkpoint / name).sha256 == entry["sha256"]:
            return None
    except UserError as error:
        return str(error)
    return f"the content of {checkpoint / name} is not what was written"


def read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """{file: {bytes, sha256}} of a checkpoint. Raises UserError when it cannot be read."""
    path = checkpoint / MANIFEST
    if not path.exists():
        raise UserError(f"{path} is missing")
    remedy = "the checkpoint is damaged"
    content = read_json(path, remedy)
    require_shape(content, _MANIFEST_SHAPE, path, remedy)
    files: dict[str, dict[str, Any]] = content["files"]
    # Names of files in this folder only, whoever wrote the manifest.
    strange = next((name for name in files if not _FILE.fullmatch(name) or name in (".", "..", MANIFEST)), None)
    if strange is not None:
        raise UserError(f"{path} names {strange[:80]!r}, which is no file of this folder: {remedy}.")
    return files


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Counters and identities of a checkpoint. Raises UserError when they cannot be read, or are not of their types."""
    path, remedy = checkpoint / STATE, "choose another checkpoint"
    content = with_current_keys(read_json(path, remedy, nan=True))
    require_shape(content, _STATE_SHAPE, path, remedy)
    return content


def publish(aside: Path, target: Path, files: dict[str, dict[str, Any]]) -> None:
    """Complete the folder `aside`, of which every file in `files` is on the disk, and make it the checkpoint `target`.

    A whole checkpoint that is there already, from which the run has just been resumed, stays; a damaged one goes.
    Raises UserError when a file is not there as it was written, which leaves everything as it is.
    """
    for name, entry in files.items():
        _refuse_unseen(aside / name, entry["bytes"])
    if target.exists():
        if damage(target) is None:
            shutil.rmtree(aside)
            return
        remove(target)
    write_whole(aside / MANIFEST, json.dumps({"format": 1, "files": files}, indent=1).encode())
    sync_folder(aside)
    os.rename(aside, target)


def _refuse_unseen(path: Path, size: int) -> None:
    """Raise UserError unless this node sees `path` with `size` bytes, as the rank that wrote it reports."""
    try:
        seen = path.stat().st_size
    except OSError:
        seen = None
    if seen != size:
        found = "does not see it" if seen is None else f"sees {seen} bytes"
        raise UserError(
            f"{path} was written with {size} bytes, and the node of rank 0 {found}: run_root must be on a filesystem "
            "that all nodes share"
        )


def succeed(target: Path, keep: int, kept: Callable[[int], bool]) -> None:
    """Let the checkpoint `target`, just published, take the place of older ones: `latest` names it, and then they are
    dropped. Where that fails they stay until the next one, and a warning is printed: the checkpoint itself is there."""
    try:
        sync_folder(target.parent)
        write_whole(target.parent / LATEST, f"{target.name}\n".encode())
        drop_old(target.parent, keep, kept)
    except (OSError, UserError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        say(f"warning: {target} is written, but older checkpoints could not be dropped for it ({reason}): they stay.")


def named_by_latest(run_folder: Path) -> Path | None:
    """The checkpoint that was written last, there or not; None where that is not known."""
    try:
        name = (run_folder / FOLDER / LATEST).read_text(encoding="utf8").strip()
    except (OSError, ValueError):
        return None
    return run_folder / FOLDER / name if _NAME.fullmatch(name) else None


def drop_old(checkpoints: Path, keep: int, kept: Callable[[int], bool]) -> None:
    """Remove all but the newest `keep` checkpoints and those for whose step `kept` is true."""
    for old in checkpoints_of(checkpoints.parent)[:-keep]:
        if not kept(step_of(old)):
            remove(old)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, which no longer has its name from the first moment on."""
    gone = checkpoint.with_name(f"{checkpoint.name}.removed{PARTIAL}")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(checkpoint, gone)
    shutil.rmtree(gone, ignore_errors=True)


def tidy(run_folder: Path, step: int) -> list[Path]:
    """Make the folder of a run ready for going on from `step`: what a killed run left half written or half removed
    goes, and damaged checkpoints beyond that step get another name. Gives these new names."""
    folder = run_folder / FOLDER
    if not folder.is_dir():
        return []
    for partial in folder.glob(f"*{PARTIAL}"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
    renamed = []
    for checkpoint in checkpoints_of(run_folder):
        if step_of(checkpoint) > step:
            aside = checkpoint.with_name(checkpoint.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(checkpoint, aside)
            renamed.append(aside)
    return renamed

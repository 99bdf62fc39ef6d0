"""Weights & Biases: RUN/wandb, and the service's project when there is a key."""

from __future__ import annotations

import contextlib
import netrc
import os
import queue
import secrets
import shlex
import shutil
import struct
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import psutil

from sepllm_train.base.errors import first_line
from sepllm_train.base.files import write_json
from sepllm_train.base.parsing import read_json_if_any
from sepllm_train.config.schema import LoggingConfig
from sepllm_train.metrics.flops import CONVENTIONS

# What losses can be drawn against; W&B draws them against the first where a panel does not say otherwise.
AXES = (*(f"flops/{convention}" for convention in CONVENTIONS), "tokens", "seconds", "step")
_LOSSES = ("train/loss", "val/*", "eval/*")
_OTHERS = ("train/*", "checkpoint/*")
# Seconds that W&B's servers have to answer at the start.
_ANSWER_SECONDS = 20.0
_TEARDOWN_SECONDS = 5.0
_FLUSH_SECONDS = 2.0
_EXIT_CODES = {"finished": 0, "interrupted": 75}
# The file of a run, W&B's messages in LevelDB's log format, begins with 7 bytes that name the format; they belong to
# the first block.
_BLOCK, _HEADER = 32768, struct.Struct("<IHB")
_FIRST, _FULL, _LAST = 7, 1, 4
# The end of a run is the last message, or has few behind it.
_LOOKED_AT = 8


def host() -> str:
    """Name of the machine of W&B's servers."""
    return urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "api.wandb.ai"


def has_key() -> bool:
    """True if W&B would find credentials: in the environment, or for its host in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host()) is not None
    return False


class WandbTracker:
    """Mirrors a run to W&B: a record is logged at its step, so records of one step share a row of W&B's history.

    The run's id is kept in RUN/wandb.json; a run that is resumed goes on under it. Online, W&B cannot take back what
    it has: it gets the records of later steps only. Offline, a resumed run starts a new folder that is given all
    records of metrics.jsonl and stands for the earlier ones, which are removed: to upload it is to upload the run.
    """

    title = "W&B"

    def __init__(self, logging: LoggingConfig, folder: Path, name: str, mode: str, facts: dict[str, Any]) -> None:
        self.logging = logging
        self.folder = folder.resolve()
        self.name = name
        self.mode = mode
        self.facts = facts
        self.messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.run: Any = None

    def open(self) -> int:
        """Start W&B's process and the run; without an answer from its servers the run is recorded offline."""
        home = self.folder / "wandb"
        # W&B itself would go to the folder for temporary files when this one cannot be made.
        home.mkdir(exist_ok=True)
        for variable in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
            os.environ.setdefault(variable, str(home / "cache"))
        # No reports of W&B about itself: they come with two more threads and connections.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.id = self._stored_id()
        try:
            self.run = self._init(wandb, self.mode)
        except Exception as error:
            if self.mode == "offline":
                raise
            self.messages.put(f"warning: W&B is not reached ({first_line(error)}): this run is recorded offline.")
            self.mode = "offline"
            wandb.teardown()
            self.run = self._init(wandb, self.mode)
        self._define_axes()
        if self.mode == "offline":
            self._remove_earlier()
        where = self.run.url if self.mode == "online" else f"offline in {self.run.settings.sync_dir}"
        self.messages.put(f"W&B: run {self.id}, {where}")
        return int(self.run.starting_step)

    def log(self, record: dict[str, Any]) -> None:
        """Log a record at its step."""
        self.run.log(record, step=record["step"])

    def close(self, status: str) -> None:
        """Finish the run, end W&B's process and tell how to upload what was recorded offline."""
        import wandb

        if status == "interrupted":
            self.run.mark_preempting()
        self.run.finish(exit_code=_EXIT_CODES.get(status, 1))
        wandb.teardown()
        if self.mode == "offline":
            # W&B does not report that it could not write the file.
            if not has_ended(Path(self.run.settings.sync_file)):
                raise OSError(f"{self.run.settings.sync_file} is not whole: is the disk full?")
            self.messages.put(f"W&B: recorded offline, upload it with: {self._upload()}")

    def abandon(self) -> None:
        """Kill W&B's process, which breaks whatever waits for it, and take back what it wants to do at exit."""
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.name() == "wandb-core":
                    child.kill()
                    child.wait(_TEARDOWN_SECONDS)
        # In a thread: where W&B has hung once, it may hang again.
        forget = threading.Thread(target=_teardown, daemon=True)
        forget.start()
        forget.join(_TEARDOWN_SECONDS)
        if self.run is not None:
            self.messages.put(f"W&B: what it recorded until then can be uploaded with: {self._upload()}")

    def _init(self, wandb: Any, mode: str) -> Any:
        """wandb.init without all that is not the records: console, code, git, packages, machine and its load."""
        settings = wandb.Settings(
            mode=mode,
            console="off",
            silent=True,
            init_timeout=_ANSWER_SECONDS,
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            # Seconds after which a record is in the file, whoever kills W&B's process (a scheduler, with SIGTERM).
            x_transaction_log_flush_interval=_FLUSH_SECONDS,
        )
        logging = self.logging
        run = wandb.init(
            dir=str(self.folder),
            id=self.id,
            resume="allow",
            name=self.name,
            project=logging.project,
            entity=logging.entity,
            group=logging.group,
            tags=logging.tags or None,
            config=self.facts,
            settings=settings,
        )
        if not Path(run.settings.sync_dir).is_relative_to(self.folder):
            raise OSError(f"{self.folder / 'wandb'} cannot be written")
        return run

    def _define_axes(self) -> None:
        """Losses over FLOPs, everything else over steps; every axis can be chosen for every panel."""
        for axis in AXES:
            self.run.define_metric(axis)
        for names, axis in ((_OTHERS, "step"), (_LOSSES, AXES[0])):
            for name in names:
                self.run.define_metric(name, step_metric=axis)

    def _stored_id(self) -> str:
        """The id in RUN/wandb.json, made at the first start."""
        file = self.folder / "wandb.json"
        if known := read_json_if_any(file).get("id"):
            return str(known)
        new = secrets.token_hex(4)
        write_json(file, {"id": new})
        return new

    def _remove_earlier(self) -> None:
        """Remove this run's earlier offline folders, for which the new one stands."""
        current = Path(self.run.settings.sync_dir)
        for folder in current.parent.glob(f"offline-run-*-{self.id}*"):
            if folder != current:
                shutil.rmtree(folder, ignore_errors=True)

    def _upload(self) -> str:
        """The command that uploads the run."""
        return f"wandb sync {shlex.quote(str(self.run.settings.sync_dir))}"


def _teardown() -> None:
    """End W&B in this process, as far as it has begun, or what it left for the exit would be tried then and fail."""
    with contextlib.suppress(Exception):
        sys.modules["wandb"].teardown()


def messages(content: bytes) -> Iterator[bytes]:
    """The messages of a .wandb file. One that was being written when its process died or the disk was full is left out.

    Format: https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    position, message = _FIRST, b""
    while position + _HEADER.size <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER.size:
            position += left
            continue
        _, length, kind = _HEADER.unpack_from(content, position)
        position += _HEADER.size
        if position + length > len(content):
            return
        message += content[position : position + length]
        position += length
        if kind in (_FULL, _LAST):
            yield message
            message = b""


def has_ended(file: Path) -> bool:
    """True if a .wandb file holds the end of its run, which W&B writes last. Raises OSError."""
    from wandb.proto.wandb_internal_pb2 import Record

    last = deque(messages(file.read_bytes()), maxlen=_LOOKED_AT)
    return any(Record.FromString(message).WhichOneof("record_type") == "exit" for message in last)

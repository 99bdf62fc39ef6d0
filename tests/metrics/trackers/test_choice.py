"""Which tracker a configuration gives, and what is told before a run that cannot have it."""

from __future__ import annotations

import importlib.util
import json
import queue
import re
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import LoggingConfig
from sepllm_train.metrics import trackers
from sepllm_train.metrics.log import MetricsLog
from sepllm_train.metrics.trackers import Mirror, check_tracker, start_mirror, wandb_mode
from tests.metrics.trackers.wandb_file import read
from tests.support.waiting import HANG_SECONDS

KEY = "0" * 40


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_missing_package_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch, tracker: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == tracker else find(name, *a))
    with pytest.raises(UserError, match=rf"logging.tracker={tracker} needs .* pip install -e '.\[{tracker}\]'"):
        check_tracker(LoggingConfig(tracker=tracker))
    check_tracker(LoggingConfig())


def test_online_needs_a_key(no_account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online = LoggingConfig(tracker="wandb", mode="online")
    with pytest.raises(UserError, match="logging.mode=online needs an API key for api.wandb.ai: run `wandb login`"):
        check_tracker(online)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    check_tracker(online)


def test_auto(no_account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = LoggingConfig(tracker="wandb")
    assert wandb_mode(auto) == "offline"
    netrc = no_account / ".netrc"
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    netrc.chmod(0o600)
    assert wandb_mode(auto) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode(auto) == "offline"
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert wandb_mode(auto) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(auto) == "disabled"
    assert wandb_mode(LoggingConfig(tracker="wandb", mode="offline")) == "offline"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tracker": "mlflow"}, "logging.tracker=mlflow is unknown: choose one of none, wandb, tensorboard"),
        ({"mode": "on"}, "logging.mode=on is unknown: choose one of auto, online, offline"),
        ({"project": "a/b"}, "logging.project='a/b' must be a name without /"),
        ({"tags": ["x" * 65]}, "must have 1 to 64 characters"),
    ],
)
def test_mistake_in_the_configuration(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LoggingConfig(**keys)


def test_servers_that_cannot_be_reached(
    no_account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A key, but nothing listens: recorded offline, with one warning, and W&B gets what was there before too."""
    for variable, value in (("WANDB_API_KEY", KEY), ("WANDB_BASE_URL", "http://127.0.0.1:9")):
        monkeypatch.setenv(variable, value)
    for variable in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(variable, str(tmp_path / "cache") if variable.endswith("DIR") else "false")
    monkeypatch.setattr("sepllm_train.metrics.wandb_tracker._ANSWER_SECONDS", 1.0)
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    metrics.write({"step": 1, "train/loss": 3.0})
    mirror = start_mirror(LoggingConfig(tracker="wandb"), metrics, tmp_path, "name", lambda: {"a": 1})
    assert mirror is not None
    metrics.write({"step": 2, "train/loss": float("nan"), "train/lr": 0.5})
    mirror.close("finished")
    said = capsys.readouterr().out.splitlines()
    warnings = [line for line in said if line.startswith("warning")]
    assert len(warnings) == 1 and "this run is recorded offline" in warnings[0]
    assert "upload it with: wandb sync" in said[-1]
    rows = read(tmp_path).history
    assert [(row["_step"], row.get("train/loss"), row.get("train/lr")) for row in rows] == [
        (1, 3.0, None),
        (2, None, 0.5),
    ]


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_full_disk(
    no_account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, tracker: str
) -> None:
    """A limit on the size of files, which W&B's process inherits, stands for the disk: one warning, no traceback."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for variable in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(variable, str(tmp_path / "cache") if variable.endswith("DIR") else "false")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        metrics = MetricsLog(tmp_path / "metrics.jsonl")
        mirror = start_mirror(LoggingConfig(tracker=tracker), metrics, tmp_path, "name", lambda: {"a": 1})
        assert mirror is not None
        for step in range(200):
            mirror.log({"step": step} | {f"train/key{number}": step / 7 for number in range(20)})
        mirror.close("finished")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    printed = capfd.readouterr()
    (warning,) = [line for line in printed.out.splitlines() if line.startswith("warning: ")]
    assert re.search(r"is off \(.*(File too large|is the disk full\?)\): training goes on", warning)
    assert "Traceback" not in printed.out + printed.err


class Collector:
    """A tracker in memory. `first` is the first step that it lacks; `hold` is waited for in the call it names."""

    title = "collector"

    def __init__(self, first: int = 0, **hold: threading.Event) -> None:
        self.messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.first, self.hold = first, hold
        self.records: list[dict[str, Any]] = []
        self.ended: list[str] = []

    def open(self) -> int:
        self.wait("open")
        return self.first

    def log(self, record: dict[str, Any]) -> None:
        self.wait("log")
        self.records.append(record)

    def close(self, status: str) -> None:
        self.ended.append(status)

    def abandon(self) -> None:
        self.ended.append("abandoned")

    def wait(self, call: str) -> None:
        if call in self.hold:
            self.hold[call].wait(HANG_SECONDS)


def test_tracker_gets_the_steps_that_it_lacks(tmp_path: Path) -> None:
    """Those of metrics.jsonl first; a service that has steps which a resumed run trains again keeps its own."""
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        metrics.write({"step": step, "n": None})
    tracker = Collector(first=4)
    mirror = Mirror(tracker, metrics.path)
    mirror.start()
    metrics.mirror = mirror.log
    for step in range(3, 7):
        metrics.write({"step": step, "again": True})
    mirror.close("interrupted")
    mirror.close("failed")
    assert tracker.records == [{"step": 4}, {"step": 5}, *({"step": step, "again": True} for step in (4, 5, 6))]
    assert tracker.ended == ["interrupted"]


def hang_at_the_start(mirror: Mirror) -> None:
    mirror.start(seconds=0.05)


def fall_behind(mirror: Mirror) -> None:
    mirror.start()
    for step in range(10):
        mirror.log({"step": step})


@pytest.mark.parametrize(
    ("call", "disturb", "words"),
    [
        ("open", hang_at_the_start, "it did not start within 0.05 seconds"),
        ("log", fall_behind, "5 records wait for it"),
    ],
)
def test_tracker_that_hangs_is_left(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    call: str,
    disturb: Callable[[Mirror], None],
    words: str,
) -> None:
    monkeypatch.setattr(trackers, "_MOST_WAITING", 5)
    free = threading.Event()
    tracker = Collector(**{call: free})
    mirror = Mirror(tracker, tmp_path / "metrics.jsonl")
    disturb(mirror)
    mirror.log({"step": 99})
    mirror.close("finished")
    free.set()
    assert tracker.ended == ["abandoned"]
    (warning,) = capsys.readouterr().out.splitlines()
    assert warning.startswith(f"warning: collector is off ({words})")
    assert json.dumps({"step": 99}) not in map(json.dumps, tracker.records)

"""Files that a loss of power or a full disk leaves behind, and a store that is gone: one sentence, nothing hidden."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from sepllm_train.base.errors import LostRank, UserError
from sepllm_train.config.schema import Config, ParallelConfig
from sepllm_train.data.loader import _worker_died
from sepllm_train.distributed.launch import Launch, process_grid
from sepllm_train.metrics.log import MetricsLog
from sepllm_train.training import run, run_folder, run_record
from sepllm_train.training.checkpoint import save
from tests.support.waiting import HANG_SECONDS


def line(step: int) -> bytes:
    """A record as MetricsLog writes it."""
    return json.dumps({"step": step}).encode() + b"\n"


@pytest.mark.parametrize("bad", [b"\0" * 40 + b"\n", b"\xff\xfe\n", b"7\n", b"{}\n"])
def test_rewind_drops_from_the_first_line_that_is_no_record(
    tmp_path: Path, capsys: pytest.CaptureFixture, bad: bytes
) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.write_bytes(line(1) + line(2) + bad + line(3) + b'{"step": 3, "torn')
    log.rewind(9)
    assert log.path.read_bytes() == line(1) + line(2)
    assert f"warning: line 3 of {log.path} is no record" in capsys.readouterr().out


def test_rewind_of_a_sound_file_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = MetricsLog(tmp_path / "bad_steps.jsonl")
    log.path.write_bytes(line(1) + line(2) + line(3) + b'{"step": 2, "torn')
    log.rewind(2)
    assert log.path.read_bytes() == line(1) + line(2)
    assert capsys.readouterr().out == ""


def test_has_finds_records_on_the_disk_and_waiting_ones(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert not log.has(1, "val/loss")
    log.write({"step": 1, "val/loss": 2.0})
    log.waiting = [json.dumps({"step": 2, "val/loss": 1.0}) + "\n"]
    assert log.has(1, "val/loss") and log.has(2, "val/loss")
    assert not log.has(1, "train/loss") and not log.has(3, "val/loss")


@pytest.fixture
def alone() -> Any:
    """torch.distributed with this process alone, its store given."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield store
    dist.destroy_process_group()


def test_lost_store_ends_the_run_with_a_sentence(alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save whose store has ended, a real TCPStore that is gone: poll and finish raise LostRank, once."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: client)
    begin = threading.Event()
    # The part itself is not what is tested; while it is written, the store ends.
    monkeypatch.setattr(save._Job, "_write_part", lambda job: begin.wait())
    saver = save.Saver.__new__(save.Saver)
    saver.folder, saver._token, saver._last, saver._unread = tmp_path / "checkpoints", "token", None, []
    saver._job = save._Job(saver, 5, [], {})
    assert saver.poll() == []
    del server
    begin.set()
    saver._job.thread.join(HANG_SECONDS)
    with pytest.raises(LostRank, match="could not agree on checkpoint .*step_00000005"):
        saver.poll()
    saver.abandon()
    assert saver.finish() == []


def test_time_out_reaches_megatrons_groups() -> None:
    config = Config(parallel=ParallelConfig(timeout_seconds=90.0))
    with process_grid(config, Launch(rank=0, world_size=1, local_rank=0, by_torchrun=False)):
        group = parallel_state.get_tensor_model_parallel_group()
        assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 90


def test_unwritable_run_json_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason of a failed run comes out, and its last checkpoint gets its time, on a disk that is full."""
    abandoned = []

    class Failing:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.saver = SimpleNamespace(abandon=lambda: abandoned.append(True))

        def run(self, *args: Any) -> None:
            raise UserError("the reason")

    def full(folder: Path, content: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    for name in ("build_training", "Stepper", "StepLogger", "Validator"):
        monkeypatch.setattr(run, name, lambda *args, **options: None)
    monkeypatch.setattr(run.checkpoint, "Saver", lambda *args, **options: None)
    monkeypatch.setattr(run_record, "run_record", lambda *args: {})
    monkeypatch.setattr(run, "Loop", Failing)
    monkeypatch.setattr(run_folder, "describe", lambda *args: None)
    monkeypatch.setattr(run_folder, "write_run", full)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    entry = SimpleNamespace(folder=tmp_path, checkpoint=None)
    prepared: Any = SimpleNamespace(
        config=Config(),
        entry=entry,
        facts=SimpleNamespace(vocabulary=8),
        steps=SimpleNamespace(base=None),
        identity={},
        recorded_identity={},
        schedule={},
        corpus=SimpleNamespace(token_bytes=[]),
        dataset=None,
        validation={},
        initial=None,
    )
    memory: Any = threading.Lock()
    launch = Launch(rank=0, world_size=1, local_rank=0, by_torchrun=False)
    with pytest.raises(UserError, match="the reason"):
        run._train(prepared, Any, memory, launch, torch.device("cpu"))  # type: ignore[arg-type]
    assert abandoned == [True]


@pytest.mark.parametrize(
    ("error", "died"),
    [
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (EOFError(), True),
        (FileNotFoundError(2, "No such file or directory"), True),
        (FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0."), False),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0."), False),
        (PermissionError(13, "Permission denied"), False),
    ],
)
def test_which_errors_mean_a_dead_data_worker(error: Exception, died: bool) -> None:
    assert _worker_died(error) is died

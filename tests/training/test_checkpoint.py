"""Checkpoints of a small model in one process: whole or skipped, safe to load, and written while tensors change."""

from __future__ import annotations

import copy
import errno
import fcntl
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sepllm_train.base.errors import UserError
from sepllm_train.base.files import PartialFile, _warn_of_no_locks
from sepllm_train.config.schema import Config
from sepllm_train.model import initialization
from sepllm_train.training import run_folder
from sepllm_train.training.checkpoint import (
    digest,
    digests,
    files,
    load,
    load_for_evaluation,
    newest,
    save,
)
from sepllm_train.training.checkpoint.shards import rectangles
from sepllm_train.training.setup import Training
from sepllm_train.training.state import TrainState
from tests.support.waiting import HANG_SECONDS
from tests.training.checkpoints import VOCABULARY, config_of, save_steps, saver_for, update


@pytest.mark.parametrize("background", [True, False])
def test_load_gives_back_what_was_saved(tmp_path: Path, training: Training, background: bool) -> None:
    (saved,) = save_steps(tmp_path, training, 7, background=background)
    parameters = [p.detach().clone() for chunk in training.chunks for p in chunk.parameters()]
    torch.rand(1)
    update(training)
    state = load(saved, training)
    assert state == TrainState(step=7, tokens=70)
    assert all(torch.equal(a, b) for a, b in zip(parameters, training.chunks[0].parameters(), strict=True))
    again = saver_for(tmp_path / "again", training)
    again.save(state)
    again.finish()
    assert dict(digests(tmp_path / "again" / "run")) == dict(digests(saved))


@pytest.fixture
def unfilled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No initial weights can be drawn, and memory that nothing was written to is nan."""

    def drawn(*_: Any) -> None:
        pytest.fail("initial weights were drawn")

    monkeypatch.setattr(initialization, "_draw", drawn)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_an_opened_model_is_filled_by_the_checkpoint_alone(
    tmp_path: Path, training: Training, grid: torch.device, unfilled: None
) -> None:
    (saved,) = save_steps(tmp_path, training, 7)
    assert torch.empty(3).isnan().all()
    generators = torch.get_rng_state()
    opened = dict(load_for_evaluation(saved, config_of(tmp_path), VOCABULARY, grid).named_parameters())
    assert torch.equal(torch.get_rng_state(), generators)
    trained = dict(training.modules[0].named_parameters())
    assert opened.keys() == trained.keys()
    assert all(torch.equal(opened[name], trained[name]) for name in trained)


def test_a_checkpoint_that_lacks_a_parameter_is_refused(
    tmp_path: Path, training: Training, grid: torch.device, unfilled: None
) -> None:
    (saved,) = save_steps(tmp_path, training, 7)
    whole = pickle.loads((saved / ".metadata").read_bytes())
    for name in dict(training.modules[0].named_parameters()):
        metadata = copy.deepcopy(whole)
        # Layers of a kind are one tensor in a checkpoint.
        del metadata.state_dict_metadata[re.sub(r"layers\.\d+\.", "layers.", name)]
        (saved / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(UserError, match="cannot be loaded"):
            load_for_evaluation(saved, config_of(tmp_path), VOCABULARY, grid)


def test_background_save_is_of_the_moment_it_was_asked_for(tmp_path: Path, training: Training) -> None:
    saver = saver_for(tmp_path, training)
    saver.save(TrainState(step=1))
    for chunk in training.chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    (outcome,) = saver.finish()
    assert outcome.error is None and outcome.stall_seconds > 0 and outcome.bytes > 1_000_000
    load(outcome.checkpoint, training)
    assert all(p.isfinite().all() for chunk in training.chunks for p in chunk.parameters())


def test_a_save_returns_before_the_checkpoint_is_written(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned, publish = threading.Event(), files.publish

    def publish_later(*arguments: Any) -> None:
        assert returned.wait(HANG_SECONDS), "the save did not return before it was published"
        publish(*arguments)

    monkeypatch.setattr(files, "publish", publish_later)
    saver = saver_for(tmp_path, training)
    saver.save(TrainState(step=1))
    returned.set()
    (outcome,) = saver.finish()
    assert outcome.error is None and outcome.checkpoint.is_dir()


def test_old_checkpoints_are_dropped_and_latest_names_the_newest(tmp_path: Path, training: Training) -> None:
    save_steps(tmp_path, training, 1, 2, 3, 4, 5, 6, 7, keep=2, kept=lambda step: step == 3)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", *(f"step_{step:08d}" for step in (3, 6, 7))]
    assert (folder / "latest").read_text() == "step_00000007\n"


def test_same_step_is_saved_once(tmp_path: Path, training: Training) -> None:
    (saved,) = save_steps(tmp_path, training, 3)
    before = saved.stat().st_ino, digest(saved)
    save_steps(tmp_path, training, 3)
    assert (saved.stat().st_ino, digest(saved)) == before


NAMES = ["__0_0.distcp", ".metadata", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("harm", ["torn", "missing", "altered"])
def test_damaged_checkpoint_is_skipped_and_named(
    tmp_path: Path, training: Training, name: str, harm: str, capsys: Any
) -> None:
    older, newer = save_steps(tmp_path, training, 2, 4)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    content = (newer / name).read_bytes()
    if harm == "missing":
        (newer / name).unlink()
    elif harm == "torn":
        (newer / name).write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        (newer / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    entry = run_folder.settle(config_of(tmp_path), {}, {})
    assert entry.checkpoint == older and entry.step == 2
    assert list(entry.skipped) == [newer] and str(newer / name) in entry.skipped[newer]
    config = config_of(tmp_path)
    config.resume, config.name = str(newer), "other"
    with pytest.raises(UserError, match="is damaged") as refused:
        run_folder.settle(config, {}, {})
    assert str(newer / name) in str(refused.value)
    run_folder.tidy(entry)
    assert str(newer) in capsys.readouterr().out
    assert newest(tmp_path / "run") == older and (newer.with_name(newer.name + ".damaged")).is_dir()


def test_state_of_zeros_is_skipped_for_an_older_checkpoint(tmp_path: Path, training: Training) -> None:
    older, newer = save_steps(tmp_path, training, 2, 4)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    state = newer / "state.json"
    state.write_bytes(bytes(state.stat().st_size))
    entry = run_folder.settle(config_of(tmp_path), {}, {})
    assert entry.checkpoint == older and str(state) in entry.skipped[newer]


def test_part_that_rank_0_does_not_see_costs_no_older_checkpoint(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = save_steps(tmp_path, training, 1, keep=1)
    write_part = save._Job._write_part

    def elsewhere(job: Any) -> dict[str, Any]:
        part = write_part(job)
        os.rename(job.aside / part["name"], tmp_path / "on_another_node")
        return part

    monkeypatch.setattr(save._Job, "_write_part", elsewhere)
    saver = saver_for(tmp_path, training, keep=1)
    saver.save(TrainState(step=2))
    with pytest.raises(UserError, match="run_root must be on a filesystem that all nodes share"):
        saver.finish()
    assert newest(tmp_path / "run") == first
    assert sorted(p.name for p in first.parent.iterdir()) == ["latest", first.name]


@pytest.mark.parametrize("obstacle", ["latest", "step_00000001.removed.partial"])
def test_checkpoint_is_told_as_written_when_older_ones_cannot_be_dropped(
    tmp_path: Path, training: Training, obstacle: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    first, second = save_steps(tmp_path, training, 1, 2, keep=2)
    if obstacle == "latest":
        (first.parent / "latest").unlink()
        (first.parent / "latest").mkdir()
    else:
        # No folder can be renamed over a file.
        (first.parent / obstacle).write_text("")
    saver = saver_for(tmp_path, training, keep=2)
    saver.save(TrainState(step=3))
    (third,) = saver.finish()
    assert third.error is None and newest(tmp_path / "run") == third.checkpoint
    assert f"warning: {third.checkpoint} is written, but older" in capsys.readouterr().out
    assert files.damage(first) is None and files.damage(second) is None


def test_generators_of_another_type_of_device_are_not_asked_for(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    (saved,) = save_steps(tmp_path, training, 2)
    state = json.loads((saved / "state.json").read_text())
    other = "cpu" if state["layout"]["device"] == "cuda" else "cuda"
    (saved / "state.json").write_text(json.dumps(state | {"layout": state["layout"] | {"device": other}}))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load(saved, training)
    assert torch.equal(torch.get_rng_state(), before)


def continued(root: Path, origin: str) -> Config:
    """The configuration of a run that goes on from `origin` under another name."""
    config = config_of(root)
    config.resume, config.name = origin, "new"
    return config


def begin(config: Config, entry: run_folder.Entry) -> None:
    """What a run leaves in its folder when it begins."""
    entry.folder.mkdir(exist_ok=True)
    run = {"identity": {}, "schedule": {}, "origin": entry.origin, "status": "running"}
    run_folder.write_run(entry.folder, run)
    (entry.folder / "metrics.jsonl").write_text("")


def test_command_that_continues_under_another_name_can_be_repeated(tmp_path: Path, training: Training) -> None:
    (source,) = save_steps(tmp_path, training, 2)
    config = continued(tmp_path, str(source))
    first = run_folder.settle(config, {}, {})
    assert first.checkpoint == source
    begin(config, first)
    assert run_folder.settle(config, {}, {}).checkpoint == source, "nothing of its own to go on from yet"
    shutil.copytree(source, tmp_path / "new" / "checkpoints" / "step_00000004")
    for _ in range(2):
        again = run_folder.settle(config, {}, {})
        assert again.checkpoint == tmp_path / "new" / "checkpoints" / "step_00000004"
        begin(config, again)
    in_between = config_of(tmp_path)
    in_between.name = "new"
    begin(in_between, run_folder.settle(in_between, {}, {}))
    shutil.rmtree(source)
    assert run_folder.settle(config, {}, {}).checkpoint == again.checkpoint, "the origin is no longer needed"
    shutil.copytree(again.checkpoint, source)
    with pytest.raises(UserError, match="in use by an earlier run"):
        run_folder.settle(continued(tmp_path, str(tmp_path / "run")), {}, {})


def test_what_another_process_did_before_the_folder_was_claimed_is_seen(tmp_path: Path, training: Training) -> None:
    config = config_of(tmp_path)
    (older,) = save_steps(tmp_path, training, 2)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    entry = run_folder.settle(config, {}, {})
    assert run_folder.settle_anew(config, {}, {}, entry) is entry and entry.checkpoint == older
    (newer,) = save_steps(tmp_path, training, 4)
    assert run_folder.settle_anew(config, {}, {}, entry).checkpoint == newer
    run_folder.write_run(tmp_path / "run", {"status": "finished"})
    with pytest.raises(UserError, match="holds a finished run"):
        run_folder.settle_anew(config, {}, {}, entry)


def test_folder_that_a_rank_does_not_see_is_refused(tmp_path: Path, grid: torch.device) -> None:
    run_folder.check_shared(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="run_root must be on a filesystem that all nodes share"):
        run_folder.await_file(tmp_path / ".seen_00000000", 0.1)


def test_lock_ends_with_the_process_that_trained(tmp_path: Path) -> None:
    """Not with its data workers, which outlive it for some seconds when it is killed."""
    reading, writing = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        try:
            lock = run_folder.claim(tmp_path)
            worker = os.fork()
            if worker:
                os.write(writing, f"{worker} {lock.fileno()}\n".encode())
            time.sleep(HANG_SECONDS)
        finally:
            os._exit(0)
    os.close(writing)
    worker = int(os.read(reading, 100).split()[0])
    try:
        with pytest.raises(UserError, match="another process is training"):
            run_folder.claim(tmp_path)
        os.kill(trainer, signal.SIGKILL)
        os.waitpid(trainer, 0)
        os.kill(worker, 0)
        run_folder.claim(tmp_path).close()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reading)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_filesystem_without_locks_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, code: int
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    _warn_of_no_locks.cache_clear()
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    run_folder.claim(tmp_path).close()
    with PartialFile(tmp_path / "file") as file:
        file.finish()
    assert capsys.readouterr().err.count("warning: files cannot be locked") == 1


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES])
def test_refused_lock_is_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(UserError, match="another process is training"):
        run_folder.claim(tmp_path)
    with pytest.raises(UserError, match="being written by another process"):
        PartialFile(tmp_path / "file")


def test_run_of_which_no_checkpoint_is_whole_is_not_begun_anew(tmp_path: Path, training: Training) -> None:
    for checkpoint in save_steps(tmp_path, training, 2, 4):
        (checkpoint / "state.json").unlink()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no checkpoint there is whole"):
        run_folder.settle(config_of(tmp_path), {}, {})


def test_killed_after_the_last_checkpoint_is_continued_to_be_finished(tmp_path: Path, training: Training) -> None:
    (saved,) = save_steps(tmp_path, training, 100)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert run_folder.settle(config_of(tmp_path), {}, {}).step == 100
    config = config_of(tmp_path)
    config.resume, config.name = str(saved), "other"
    with pytest.raises(UserError, match="nothing is left"):
        run_folder.settle(config, {}, {})


def test_half_written_and_half_removed_folders_go(tmp_path: Path, training: Training) -> None:
    (saved,) = save_steps(tmp_path, training, 2)
    for name in ("step_00000004.1a2b3c4d.partial", "step_00000001.removed.partial"):
        shutil.copytree(saved, saved.with_name(name))
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    entry = run_folder.settle(config_of(tmp_path), {}, {})
    assert entry.checkpoint == saved and not entry.skipped
    run_folder.tidy(entry)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["latest", saved.name]


# ---------------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 12 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"no small filesystem can be mounted here ({done.stderr.strip() if done else 'no mount program'})")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_disk(small_disk: Path) -> Callable[[], None]:
    """Leave half a megabyte; gives what makes room again."""
    ballast = small_disk / "ballast"
    with open(ballast, "wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(small_disk).free - 500_000)))
    return ballast.unlink


@pytest.fixture
def limited_files(tmp_path: Path) -> Iterator[Path]:
    """A folder; files beyond the limit that `limit_files` sets cannot be written until the test is over."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def limit_files(_: Path) -> Callable[[], None]:
    """Let no file grow beyond half a megabyte; gives what lifts the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("place", "obstruct", "words"),
    [("small_disk", fill_disk, "No space left on device"), ("limited_files", limit_files, "File too large")],
)
@pytest.mark.parametrize("background", [True, False])
def test_full_disk_costs_one_checkpoint(
    request: Any, training: Training, place: str, obstruct: Callable, words: str, background: bool
) -> None:
    root = request.getfixturevalue(place)
    saver = saver_for(root, training, background=background)
    saver.save(TrainState(step=1))
    (first,) = saver.finish()
    clear = obstruct(root)
    saver.save(TrainState(step=2))
    with pytest.raises(UserError, match=f"could not be written .{words}"):
        saver.finish()
    (second,) = saver.poll()
    assert first.error is None and second.error == words
    assert newest(root / "run") == first.checkpoint and files.altered(first.checkpoint, 0, 1) is None
    assert sorted(p.name for p in first.checkpoint.parent.iterdir()) == ["latest", first.checkpoint.name]
    clear()
    saver.save(TrainState(step=2))
    (third,) = saver.finish()
    assert third.error is None and newest(root / "run") == third.checkpoint


def test_run_goes_on_without_a_checkpoint_and_fails_without_the_last(trainer: Any) -> None:
    """No file may grow beyond a megabyte: metrics can be written, checkpoints not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        outcome = trainer("name=full_disk", "training.validation_interval=0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome.code == 2
    assert "warning: checkpoint" in outcome.unfolded and "step_00000002 could not be written" in outcome.unfolded
    assert "the last checkpoint" in outcome.sentence and "File too large" in outcome.sentence
    assert [r["step"] for r in trainer.records("full_disk") if "train/loss" in r] == [1, 2, 3, 4]
    assert json.loads((trainer.root / "full_disk" / "run.json").read_text())["status"] != "finished"


def test_waiting_for_other_ranks_backs_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store also serves the steps: a long write of another rank must not be asked for all the time."""
    answers = iter([False] * 8 + [True])
    waits: list[float] = []
    job = object.__new__(save._Job)
    job.store = SimpleNamespace(check=lambda _: next(answers), get=lambda key: key.encode())
    monkeypatch.setattr(save.time, "sleep", waits.append)
    assert job._read("1") == b"1"
    assert waits == [0.02, 0.04, 0.08, 0.16, 0.32, 0.5, 0.5, 0.5]


# --------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 1, 4), (2, 3, 5)])
def test_rectangles_are_the_elements_in_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(torch.Size(shape).numel())
    whole = numbers.view(shape)
    for low in range(len(numbers)):
        for high in range(low + 1, len(numbers) + 1):
            blocks = list(rectangles(shape, low, high))
            parts = [whole[tuple(slice(c, c + s) for c, s in zip(*block, strict=True))].reshape(-1) for block in blocks]
            assert torch.equal(torch.cat(parts), numbers[low:high]) and len(blocks) <= 2 * len(shape) - 1

"""Faults of the data under a run: changed files, dead data workers, tokens that the model does not have."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from sepllm_train.base.errors import EXIT_USER_ERROR, RankError, UserError
from sepllm_train.config.schema import Config, DataConfig
from sepllm_train.data import loader
from sepllm_train.data.corpus import DataFiles, open_corpus
from sepllm_train.data.loader import Batch, MicroBatchSampler, micro_batches
from sepllm_train.data.splits import build_datasets
from tests.faults.processes import Launcher, descendants, kill, records

LONG = "training.steps=100000"
VOCABULARY = 4096


@pytest.fixture
def alone() -> Iterator[None]:
    """The datasets ask for the rank: a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def copy_of(prefix: Path, folder: Path) -> Path:
    """A dataset of the same content that a test may spoil."""
    folder.mkdir(exist_ok=True)
    for file in prefix.parent.glob(f"{prefix.name}.*"):
        (folder / file.name).write_bytes(file.read_bytes())
    # The tokenizer, whose name is in the header, is looked up beside the data.
    for file in prefix.parent.glob("*.model"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder / prefix.name


def config_of(prefix: Path, cache: Path) -> Config:
    """A run on one dataset."""
    data = DataConfig(source="prefixes", prefixes=[str(prefix)], sequence_length=64, cache=str(cache))
    return Config(data=data)


def batches_of(prefix: Path, cache: Path, *, workers: int, **options: Any) -> Iterator[Batch]:
    """Micro-batches of two samples from 30 steps of four, as a run reads them."""
    config = config_of(prefix, cache)
    dataset, _ = build_datasets(config, open_corpus(config.data))
    sampler = MicroBatchSampler(range(30 * 4), micro_batch=2, replica=0, replicas=1)
    return micro_batches(dataset, sampler, workers=workers, device=torch.device("cpu"), **options)


def test_part_of_a_step_is_left_after_some_micro_batches() -> None:
    sampler = MicroBatchSampler(range(3 * 8, 6 * 8), micro_batch=2, replica=1, replicas=2)
    whole = list(sampler)
    for done in range(len(whole)):
        left = sampler.after(done)
        assert list(left) == whole[done:] and len(left) == len(whole) - done
        assert list(left.after(1)) == whole[done + 1 :]


def test_killed_worker_is_replaced_and_the_order_stays(alone: None, sample_prefix: Path, tmp_path: Path) -> None:
    expected = list(batches_of(sample_prefix, tmp_path, workers=0))
    told: list[str] = []
    handler = signal.getsignal(signal.SIGCHLD)
    batches = batches_of(sample_prefix, tmp_path, workers=2, lost=told.append)
    found = []
    for number, batch in enumerate(batches):
        found.append(batch)
        if number in (2, 25):
            workers = descendants(os.getpid())
            assert len(workers) >= 2
            for pid in workers:
                kill(pid, signal.SIGKILL)
    assert len(told) == 2 and all("a data worker died" in sentence for sentence in told)
    assert len(found) == len(expected) == 60
    assert all(torch.equal(a[key], b[key]) for a, b in zip(expected, found, strict=True) for key in a)
    # A death is never told from a signal handler, in the middle of a step.
    assert signal.getsignal(signal.SIGCHLD) == handler


class Deadly(torch.utils.data.Dataset):
    """Kills the process that reads it."""

    def __getitem__(self, number: int) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_keep_dying_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch looks after its workers every five seconds: fewer deaths than in a run.
    monkeypatch.setattr(loader, "RESTARTS", 1)
    told: list[str] = []
    sampler = MicroBatchSampler(range(2 * 2), micro_batch=2, replica=0, replicas=1)
    batches = micro_batches(Deadly(), sampler, workers=1, device=torch.device("cpu"), lost=told.append)
    with pytest.raises(RankError, match="data workers died 2 times in a row.*lower data.workers"):
        next(batches)
    assert len(told) == 1


def spoil(prefix: Path, document: int, place: int, token: int) -> None:
    """Overwrite a token of a document."""
    store = IndexedDataset(str(prefix), multimodal=False, mmap=True)
    dtype, pointer = store.index.dtype, int(store.index.sequence_pointers[document])
    with open(f"{prefix}.bin", "r+b") as file:
        file.seek(pointer + place * DType.size(dtype))
        file.write(np.array([token], dtype=dtype).tobytes())


def test_token_beyond_the_vocabulary_is_named(alone: None, sample_prefix: Path, tmp_path: Path) -> None:
    prefix = copy_of(sample_prefix, tmp_path / "spoiled")
    spoil(prefix, document=7, place=2, token=VOCABULARY)
    config = config_of(prefix, tmp_path)
    dataset, _ = build_datasets(config, open_corpus(config.data))
    # Document 7 has hundreds of tokens: of the samples cut from it, one holds the spoiled one.
    steps = sorted({n // 4 for n in range(50_000) if 7 in dataset.documents(n)[1]})
    with pytest.raises(RankError) as raised:
        for step in steps:
            sampler = MicroBatchSampler(range(4 * step, 4 * step + 4), micro_batch=2, replica=0, replicas=1)
            list(micro_batches(dataset, sampler, workers=0, device=torch.device("cpu"), vocabulary=VOCABULARY))
    assert f"{prefix}.bin holds token {VOCABULARY} in document 7, but the vocabulary has 4,096" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 2), r"changed from [\d,]+ to [\d,]+ bytes"),
        (lambda path: os.utime(path), "was written to"),
        (lambda path: path.unlink(), "has gone"),
    ],
)
@pytest.mark.parametrize("suffix", [".bin", ".idx", ".sep.bin"])
def test_change_of_a_data_file_is_seen(
    sample_prefix: Path, tmp_path: Path, suffix: str, change: Callable[[Path], None], words: str
) -> None:
    prefix = copy_of(sample_prefix, tmp_path / "data")
    files = DataFiles(open_corpus(config_of(prefix, tmp_path).data))
    files.check()
    path = Path(f"{prefix}{suffix}")
    change(path)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} {words} while the run reads it"):
        files.check()


def test_changed_data_ends_the_run_before_it_saves(launcher: Launcher, sample_prefix: Path, tmp_path: Path) -> None:
    prefix = copy_of(sample_prefix, tmp_path / "data")
    options = (LONG, "data=prefixes", f"data.prefixes=[{prefix}]", "data.workers=1", "training.checkpoint_interval=20")
    with launcher.alone("changed", *options) as run:
        run.wait_until(lambda: bool(run.steps_saved()), "a checkpoint")
        os.utime(f"{prefix}.sep.bin")
        logged = records(run.folder)[-1]["step"]
        assert run.code() == EXIT_USER_ERROR
        assert f"error: {prefix}.sep.bin was written to while the run reads it" in run.text()
        assert "Traceback" not in run.text() and run.status() == "failed"
        last = records(run.folder)[-1]["step"]
        assert all(step <= last for step in run.steps_saved()) and last - logged < 100


@pytest.mark.slow
def test_run_outlives_its_data_worker(launcher: Launcher) -> None:
    """kill -9 of the worker process of a real run: the losses are those of a run without workers."""
    options = ("training.steps=40",)
    with launcher.alone("workers0", *options) as run:
        assert run.code() == 0, run.text()[-2000:]
    with launcher.alone("workers1", *options, "data.workers=1") as run:
        run.wait_for_text("step 3/")
        (worker,) = [pid for pid in descendants(run.processes[0].pid) if "pretrain.py" in command_of(pid)]
        kill(worker, signal.SIGKILL)
        assert run.code() == 0, run.text()[-2000:]
        assert "warning: rank 0: a data worker died" in run.text()
    whole, disturbed = (records(launcher.root / name) for name in ("workers0", "workers1"))
    key = "train/loss"
    assert [r[key] for r in disturbed if key in r] == [r[key] for r in whole if key in r]
    assert sum(r.get("train/lost_workers", 0) for r in disturbed) == 1


def command_of(pid: int) -> str:
    """Command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode()

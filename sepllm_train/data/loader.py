"""Micro-batches of a rank, in an order that depends on nothing but the seed and the step."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sepllm_train.base.errors import RankError

Batch = dict[str, Tensor]
# Losses of a data worker in a row, without a micro-batch in between, that are met with new workers.
RESTARTS = 3


class MicroBatchSampler:
    """Sample numbers of each micro-batch of one data-parallel rank, for steps that read `samples` one after another.

    The batches are multiples of `micro_batch` x `replicas`, so that a step reads the same samples in every layout.
    """

    def __init__(self, samples: range, *, micro_batch: int, replica: int, replicas: int) -> None:
        self.samples = samples
        self.micro_batch = micro_batch
        self.replica = replica
        self.replicas = replicas

    def __len__(self) -> int:
        return len(self.samples) // (self.micro_batch * self.replicas)

    def after(self, done: int) -> MicroBatchSampler:
        """The micro-batches after the first `done` ones."""
        left = self.samples[done * self.micro_batch * self.replicas :]
        return MicroBatchSampler(left, micro_batch=self.micro_batch, replica=self.replica, replicas=self.replicas)

    def __iter__(self) -> Iterator[list[int]]:
        for begin in self.samples[self.replica * self.micro_batch :: self.micro_batch * self.replicas]:
            yield list(range(begin, begin + self.micro_batch))


class PaddedSampler:
    """Sample numbers 0 ... samples - 1 in micro-batches of equal count on every replica; -1 fills the last ones.

    The number of micro-batches is a multiple of `multiple`, which interleaved pipelines need.
    """

    def __init__(self, samples: int, *, micro_batch: int, replica: int, replicas: int, multiple: int = 1) -> None:
        stride = micro_batch * replicas
        self.rounds = -(-samples // (stride * multiple)) * multiple
        numbers = [n if n < samples else -1 for n in range(self.rounds * stride)]
        self.batches = [
            numbers[r * stride + replica * micro_batch : r * stride + (replica + 1) * micro_batch]
            for r in range(self.rounds)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def after(self, done: int) -> list[list[int]]:
        """The micro-batches after the first `done` ones."""
        return self.batches[done:]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class MaskedDataset(Dataset):
    """Adds `counted` (f32 scalar) to each sample: 0 for the filling of a last micro-batch, else 1."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.dataset[max(number, 0)], "counted": torch.tensor(float(number >= 0))}

    def documents(self, number: int) -> tuple[str, list[int]]:
        """(prefix of the dataset, numbers of the documents) that sample `number` is cut from."""
        return self.dataset.documents(max(number, 0))


def micro_batches(
    dataset: Any,
    sampler: Any,
    *,
    workers: int,
    device: torch.device,
    on_host: Sequence[str] = (),
    vocabulary: int | None = None,
    lost: Callable[[str], None] | None = None,
) -> Iterator[Batch]:
    """Micro-batches of `sampler` on `device`: each entry of a sample stacked to [B, ...]. Those named in `on_host` stay
    on the host.

    A worker that dies is replaced, and the micro-batches come in the same order; `lost` is called each time with a
    message. Raises RankError when new workers die RESTARTS times in a row, and when a token is not below `vocabulary`.
    """
    loaded = _load(dataset, sampler, workers, device)
    delivered = failures = 0
    while True:
        try:
            batch = next(loaded, None)
        except (RuntimeError, OSError, EOFError) as error:
            if not workers or not _worker_died(error):
                raise
            failures += 1
            if failures > RESTARTS:
                raise RankError(
                    f"data workers died {failures} times in a row, the last time at micro-batch {delivered + 1} since "
                    "the start: they may be short of memory (see the kernel's log); lower data.workers, 0 reads in "
                    "the main process."
                ) from None
            (lost or _warn)(f"a data worker died ({_first_line(error)}): starting new ones at the same micro-batch")
            loaded = _load(dataset, sampler.after(delivered), workers, device)
            continue
        if batch is None:
            return
        if vocabulary is not None:
            _check_tokens(batch, vocabulary, dataset, sampler, delivered)
        failures = 0
        delivered += 1
        yield {
            key: value if key in on_host else value.to(device, non_blocking=True)
            for key, value in batch.items()
            if torch.is_tensor(value)
        }


def _load(dataset: Dataset, sampler: Any, workers: int, device: torch.device) -> Iterator[Batch]:
    """Micro-batches on the host, prefetched by `workers` processes."""
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        # Its own generator: a loader draws a seed when it starts, and a resumed run starts more of them.
        generator=torch.Generator().manual_seed(0),
    )
    handler = signal.getsignal(signal.SIGCHLD)
    loaded = iter(loader)
    # torch raises for a lost worker from a signal handler, in the middle of a step or of a save. Without that handler
    # it raises when the next micro-batch is asked for, which is where it can be met.
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    return loaded


def _worker_died(error: Exception) -> bool:
    """True when fetching a micro-batch failed because a worker is gone, rather than by an error inside a worker.

    A worker that dies while it hands over a batch leaves a broken connection.
    """
    if isinstance(error, RuntimeError):
        return re.search(r"DataLoader worker \(pid", str(error)) is not None
    broken = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
    return broken and "in DataLoader worker process" not in str(error)


def _check_tokens(batch: Batch, vocabulary: int, dataset: Any, sampler: Any, delivered: int) -> None:
    """Raise RankError for a token that the model does not have, before it is looked up on the device."""
    for key in ("tokens", "labels"):
        # In NumPy: torch deals a large batch out to its threads, and waking them takes ten times as long as this.
        values = batch[key].numpy()
        low, high = int(values.min()), int(values.max())
        if low >= 0 and high < vocabulary:
            continue
        wrong = low if low < 0 else high
        row, place = (int(value) for value in (batch[key] == wrong).nonzero()[0])
        number = next(iter(sampler.after(delivered)))[row]
        prefix, documents = dataset.documents(number)
        # Documents of the sample that began up to this token.
        begun = len(batch["document_start"][row, : place + 1].unique())
        raise RankError(
            f"{prefix}.bin holds token {wrong} in document {documents[begun - 1]}, but the vocabulary has "
            f"{vocabulary:,} entries: the file is damaged or was made with another tokenizer; check it with "
            f"`sepllm prepare verify {prefix}`."
        )


def _warn(message: str) -> None:
    """Print a warning of this process alone."""
    print(f"warning: {message}.", file=sys.stderr, flush=True)


def _first_line(error: BaseException) -> str:
    """First line of an error, without torch's advice."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")

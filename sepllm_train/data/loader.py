"""Micro-batches of a rank, in an order that depends on nothing but the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Tensor]


class MicroBatchSampler:
    """Sample numbers of each micro-batch of one data-parallel rank, from step `first_step` on.

    Step t reads samples t * global_batch ... (t + 1) * global_batch - 1 whatever the layout.
    """

    def __init__(self, steps: range, *, global_batch: int, micro_batch: int, replica: int, replicas: int) -> None:
        self.steps = steps
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.replica = replica
        self.replicas = replicas

    def __len__(self) -> int:
        return len(self.steps) * self.global_batch // (self.micro_batch * self.replicas)

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.micro_batch * self.replicas
        for step in self.steps:
            for begin in range(step * self.global_batch, (step + 1) * self.global_batch, stride):
                first = begin + self.replica * self.micro_batch
                yield list(range(first, first + self.micro_batch))


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
        return self.rounds

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class MaskedDataset(Dataset):
    """Adds `counted` (f32 scalar) to each sample: 0 for the filling of a last micro-batch, else 1."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.dataset[max(number, 0)], "counted": torch.tensor(float(number >= 0))}


def micro_batches(dataset: Dataset, sampler: Any, *, workers: int, device: torch.device) -> Iterator[Batch]:
    """Micro-batches of `sampler` on `device`: each entry of a sample stacked to [B, ...]."""
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        # Its own generator: a loader draws a seed when it starts, and a resumed run starts more of them.
        generator=torch.Generator().manual_seed(0),
    )
    for batch in loader:
        yield {key: value.to(device, non_blocking=True) for key, value in batch.items() if torch.is_tensor(value)}

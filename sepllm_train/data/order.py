"""The order in which samples are read: endless, and the same however long the run is.

megatron-core shuffles all epochs of a run together, so that its order depends on the number of steps and its index
grows with them. Here an index covers one epoch, and what is beyond it follows from the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from megatron.core.datasets import helpers
from numpy.typing import NDArray
from torch.utils.data import Dataset

# Samples after which a blend repeats its pattern of sources; weights are met to one part in this.
BLEND_PERIOD = 65536


class Epochs(Dataset):
    """Sample n of `dataset` repeated without end; each epoch after the first is permuted by (seed, epoch)."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        # Of a later epoch; the first one is read as the dataset is ordered.
        self.epoch = 0
        self.permutation: NDArray[np.integer] | None = None

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.dataset[self._place(number)]

    def documents(self, number: int) -> tuple[str, list[int]]:
        """(prefix of the dataset, numbers of the documents) that sample `number` is cut from."""
        return self.dataset.documents(self._place(number))

    def _place(self, number: int) -> int:
        """Sample of the dataset that sample `number` of the endless order is."""
        samples = len(self.dataset)
        epoch, place = divmod(number, samples)
        if not epoch:
            return place
        if self.permutation is None or epoch != self.epoch:
            self.epoch = epoch
            # The order is the same in either type.
            self.permutation = np.arange(samples, dtype=np.int32 if samples < 2**31 else np.int64)
            np.random.default_rng((self.seed, epoch)).shuffle(self.permutation)
        return int(self.permutation[place])


class Blend(Dataset):
    """Samples of several endless datasets in proportion to `weights` (which sum to 1), evenly interleaved.

    megatron-core's blending fills one period; period after period, each source goes on where it was.
    """

    def __init__(self, datasets: Sequence[Any], weights: list[float]) -> None:
        self.datasets = datasets
        self.source = np.zeros(BLEND_PERIOD, dtype=np.int16)
        self.place = np.zeros(BLEND_PERIOD, dtype=np.int64)
        helpers.build_blending_indices(self.source, self.place, weights, len(datasets), BLEND_PERIOD, False)
        self.per_period = np.bincount(self.source, minlength=len(datasets))

    def __getitem__(self, number: int) -> dict[str, Any]:
        source, place = self._place(number)
        return self.datasets[source][place]

    def documents(self, number: int) -> tuple[str, list[int]]:
        """(prefix of the dataset, numbers of the documents) that sample `number` is cut from."""
        source, place = self._place(number)
        return self.datasets[source].documents(place)

    def _place(self, number: int) -> tuple[int, int]:
        """(source, its sample) that sample `number` of the blend is."""
        period, offset = divmod(number, BLEND_PERIOD)
        source = int(self.source[offset])
        return source, period * int(self.per_period[source]) + int(self.place[offset])

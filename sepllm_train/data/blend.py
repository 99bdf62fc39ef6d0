"""Blends: the order in which the samples of several endless datasets are read, in proportion to their weights.

Both orders compute the source of any sample from its number, so a run may begin at any step and be of any length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any, TypeAlias

import numpy as np
from megatron.core.datasets import helpers
from torch.utils.data import Dataset

from sepllm_train.config.compatibility import LATEST_BLEND_ORDER

# Samples after which the earlier order repeats its pattern of sources: it meets weights to one part in this.
PERIOD = 65536


@dataclass(frozen=True)
class _Split:
    """A node of the tree of sources: `share` in `whole` of the samples that reach it go left."""

    left: _Tree
    right: _Tree
    share: int
    whole: int

    def left_of(self, samples: int) -> int:
        """Number of the first `samples` samples that go left, to the nearest whole one."""
        return (2 * samples * self.share + self.whole) // (2 * self.whole)


_Tree: TypeAlias = "_Split | int"


class _Blend(Dataset, ABC):
    """Samples of several endless datasets."""

    def __init__(self, datasets: Sequence[Any]) -> None:
        self.datasets = datasets

    def __getitem__(self, number: int) -> dict[str, Any]:
        source, place = self.place(number)
        return self.datasets[source][place]

    def documents(self, number: int) -> tuple[str, list[int]]:
        """(prefix of the dataset, numbers of the documents) that sample `number` is cut from."""
        source, place = self.place(number)
        return self.datasets[source].documents(place)

    @abstractmethod
    def place(self, number: int) -> tuple[int, int]:
        """(source, its sample) that sample `number` of the blend is."""


class Blend(_Blend):
    """Samples of several endless datasets in proportion to `weights`, evenly interleaved.

    The sources are the leaves of a tree, and each node deals the samples that reach it to its two sides as evenly as
    whole samples allow. After any number of samples each of up to four sources has its share to within one sample,
    each of more to within two.
    """

    def __init__(self, datasets: Sequence[Any], weights: Sequence[float]) -> None:
        super().__init__(datasets)
        self.tree = _tree_of([Fraction(exact_weight(weight)) for weight in weights])

    def place(self, number: int) -> tuple[int, int]:
        """(source, its sample) that sample `number` of the blend is."""
        node = self.tree
        while isinstance(node, _Split):
            before = node.left_of(number)
            if node.left_of(number + 1) > before:
                node, number = node.left, before
            else:
                node, number = node.right, number - before
        return node, number


class PeriodicBlend(_Blend):
    """The order of runs that began before `Blend`: megatron-core's blending fills one period, which is repeated."""

    def __init__(self, datasets: Sequence[Any], weights: Sequence[float]) -> None:
        super().__init__(datasets)
        self.source = np.zeros(PERIOD, dtype=np.int16)
        self.places = np.zeros(PERIOD, dtype=np.int64)
        helpers.build_blending_indices(self.source, self.places, list(weights), len(datasets), PERIOD, False)
        self.per_period = np.bincount(self.source, minlength=len(datasets))

    def place(self, number: int) -> tuple[int, int]:
        """(source, its sample) that sample `number` of the blend is."""
        period, offset = divmod(number, PERIOD)
        source = int(self.source[offset])
        return source, period * int(self.per_period[source]) + int(self.places[offset])


def blend_of(datasets: Sequence[Any], weights: Sequence[float], order: int = LATEST_BLEND_ORDER) -> Dataset:
    """The datasets in the order of runs whose checkpoints record `order`; a single one is no blend."""
    if len(datasets) == 1:
        return datasets[0]
    return (PeriodicBlend if order == 1 else Blend)(datasets, weights)


def exact_weight(weight: float) -> str:
    """The decimal number that stands for a weight in the order and in checkpoints: equal for what sums to it in
    another way, such as 0.1 of 0.3 and 1 of 3."""
    return f"{weight:.12g}"


def _tree_of(weights: list[Fraction]) -> _Tree:
    """The tree over the sources, from the heaviest to the lightest, whose largest deviation is least.

    A node's rounding is half a sample, of which a source below takes its fraction of the node's weight. By the sum of
    these over a source's path, with its node's heaviest source in its place, the best split of each range is chosen.
    """
    order = sorted(range(len(weights)), key=lambda source: (-weights[source], source))
    unit = lcm(*(weight.denominator for weight in weights))
    ends = [0]
    for source in order:
        ends.append(ends[-1] + int(weights[source] * unit))
    count = len(order)
    cost = {(first, first + 1): Fraction(1) for first in range(count)}
    middles: dict[tuple[int, int], int] = {}
    for size in range(2, count + 1):
        for first in range(count - size + 1):
            last = first + size
            worst = [max(cost[first, middle], cost[middle, last]) for middle in range(first + 1, last)]
            middles[first, last] = first + 1 + worst.index(min(worst))
            cost[first, last] = min(worst) + Fraction(ends[first + 1] - ends[first], ends[last] - ends[first])

    def node(first: int, last: int) -> _Tree:
        if last == first + 1:
            return order[first]
        middle = middles[first, last]
        share, whole = ends[middle] - ends[first], ends[last] - ends[first]
        return _Split(node(first, middle), node(middle, last), share, whole)

    return node(0, count)

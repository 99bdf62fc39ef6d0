"""Curves of many rows, thinned to what a screen can show."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SCALES = ("linear", "log")
# Buckets of a curve on a linear axis: at least half of MOST once there are as many rows, each drawn by two points.
MOST = 640
# On a logarithmic axis a bucket is this much longer than all rows before it.
GROWTH = 0.015


class Rows:
    """A table of float64 that grows: 8 bytes a number, doubled when full. Column 0 is the step, rising."""

    def __init__(self, columns: int) -> None:
        self._data = np.empty((256, columns))
        self.count = 0

    @property
    def table(self) -> NDArray[np.float64]:
        """The rows so far, [count, columns]; not to be kept over an `add`."""
        return self._data[: self.count]

    def add(self, row: Sequence[float]) -> None:
        """Append a row; it takes the place of the last one when that is of the same step."""
        if self.count and self._data[self.count - 1, 0] == row[0]:
            self.count -= 1
        if self.count == len(self._data):
            self._data = np.concatenate([self._data, np.empty_like(self._data)])
        self._data[self.count] = row
        self.count += 1

    def drop_after(self, step: float) -> None:
        """Drop the rows of later steps."""
        self.count = int(np.searchsorted(self.table[:, 0], step, side="right"))


class Thinned:
    """Numbers of the rows that draw a curve as all of its rows would: the lowest and highest of each bucket.

    A whole bucket does not change any more, so that an update costs the new rows only. A bucket of nan alone keeps one
    of them, which is a gap in the curve; the last row is always kept.
    """

    def __init__(self, scale: str) -> None:
        self._linear = scale == "linear"
        self._begin(1)

    def _begin(self, length: int) -> None:
        """Begin with no row, and buckets of `length` rows on a linear axis."""
        self._length = length
        self._start = 0
        self._rows: list[int] = []
        self._means: list[float] = []

    def rows(self, values: NDArray[np.float64], unchanged: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Row numbers, rising, and for each the mean of its bucket (nan without a finite value).

        `values` is the whole column, of which the first `unchanged` rows are as before.
        """
        count = len(values)
        if unchanged < self._start:
            self._begin(1)
        while self._linear and count > self._length * MOST:
            self._begin(2 * self._length)
        last: list[int] = []
        mean = math.nan
        while self._start < count:
            end = self._start + (self._length if self._linear else max(1, int(self._start * GROWTH)))
            bucket = values[self._start : end]
            picked = [self._start + row for row in _extremes(bucket)]
            mean = _mean(bucket)
            if end >= count:
                # The last row may be replaced and its bucket may grow.
                last = [*picked, count - 1] if picked[-1] < count - 1 else picked
                break
            self._rows += picked
            self._means += [mean] * len(picked)
            self._start = end
        return np.array(self._rows + last, dtype=np.intp), np.array(self._means + [mean] * len(last))


def _mean(values: NDArray[np.float64]) -> float:
    """Mean of the values that are not nan, nan without one."""
    mean = float(values.mean())
    if math.isnan(mean):
        known = values[~np.isnan(values)]
        return float(known.mean()) if len(known) else math.nan
    return mean


def _extremes(values: NDArray[np.float64]) -> list[int]:
    """Positions of the lowest and the highest value in their order; of the first when all are nan."""
    low, high = int(values.argmin(0)), int(values.argmax(0))
    if np.isnan(values[low]):
        if np.isnan(values).all():
            return [0]
        low, high = int(np.nanargmin(values)), int(np.nanargmax(values))
    return [low] if low == high else sorted((low, high))

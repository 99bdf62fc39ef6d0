"""Thinned curves: bounded, no extreme lost, and the same however the rows came."""

from __future__ import annotations

import numpy as np
import pytest

from sepllm_train.watch.thin import MOST, SCALES, Thinned


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("count", [1, 2, 7, 640, 641, 5000, 100_000])
def test_extremes_stay_and_the_number_is_bounded(scale: str, count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    rows, means = Thinned(scale).rows(values, 0)
    assert len(rows) == len(means) <= (2 * MOST + 1 if scale == "linear" else 1200)
    assert np.all(np.diff(rows) > 0) and rows[-1] == count - 1
    assert {values.argmin(), values.argmax()} <= set(rows.tolist())
    if count <= MOST and scale == "linear":
        assert rows.tolist() == list(range(count)) and means.tolist() == values.tolist()


@pytest.mark.parametrize("count", [5000, 100_000])
def test_linear_buckets_keep_their_own_extremes_and_means(count: int) -> None:
    """Against whole buckets computed at once: the length is the power of two that leaves at most MOST of them."""
    values = np.random.default_rng(1).normal(size=count)
    length = next(length for length in (2**power for power in range(20)) if count <= length * MOST)
    rows, means = Thinned("linear").rows(values, 0)
    for start in range(0, count - length, length):
        bucket = values[start : start + length]
        inside = (rows >= start) & (rows < start + length)
        assert set(rows[inside] - start) == {bucket.argmin(), bucket.argmax()}
        assert means[inside] == pytest.approx(bucket.mean())
    assert count / length > MOST / 2


def test_the_start_is_whole_on_a_logarithmic_axis() -> None:
    rows, _ = Thinned("log").rows(np.random.default_rng(1).normal(size=100_000), 0)
    assert rows[:80].tolist() == list(range(80))
    # At least 80 points from each power of ten to the next.
    assert all(np.count_nonzero((rows >= low) & (rows < 10 * low)) >= 80 for low in (100, 1000, 10_000))


@pytest.mark.parametrize("scale", SCALES)
def test_rows_in_pieces_give_the_same_as_at_once(scale: str) -> None:
    """Rows come, and now and then the last ones are replaced by others, as after a resume."""
    random = np.random.default_rng(3)
    thinned, values, unchanged = Thinned(scale), np.empty(0), 0
    for _ in range(120):
        if random.random() < 0.2:
            values = values[: random.integers(len(values) + 1)]
        unchanged = min(unchanged, len(values))
        values = np.concatenate([values, random.normal(size=random.integers(60))])
        rows, means = thinned.rows(values, unchanged)
        whole_rows, whole_means = Thinned(scale).rows(values, 0)
        unchanged = len(values)
        if scale == "log" or len(values) <= MOST:
            assert rows.tolist() == whole_rows.tolist() and means.tolist() == whole_means.tolist()
        if len(values):
            assert {values.argmin(), values.argmax(), len(values) - 1} <= set(rows.tolist())


def test_gaps_stay() -> None:
    values = np.ones(10_000)
    values[4000:6000] = np.nan
    values[17] = np.nan
    for scale in SCALES:
        rows, means = Thinned(scale).rows(values, 0)
        gap = (rows > 4100) & (rows < 5900)
        assert gap.any() and np.isnan(values[rows[gap]]).all() and np.isnan(means[gap]).all()
        outside = (rows > 100) & (rows < 3900)
        assert outside.any() and (means[outside] == 1).all()

"""Statistics against brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep import stats
from data_prep.separators import class_numbers
from data_prep.sidecar import open_classes, read_header
from data_prep.stats import format_statistics, statistics
from sepllm_train.base.errors import UserError


@pytest.mark.parametrize(("initial", "window", "length"), [(3, 8, 64), (0, 1, 50), (70, 5, 64), (2, 99, 64)])
@pytest.mark.parametrize("separators", ["paper", "all", "period,newline"])
def test_visible_share_counts_pairs(dataset: Path, initial: int, window: int, length: int, separators: str) -> None:
    visible = statistics(dataset, separators=separators, initial=initial, window=window, length=length).visible
    chosen = np.isin(open_classes(dataset), class_numbers(separators))
    chosen = chosen[: len(chosen) // length * length].reshape(-1, length)
    i, j = np.mgrid[:length, :length]
    causal = j <= i
    pairs = sum(int((causal & ((j < initial) | (i - j < window) | row[None])).sum()) for row in chosen)
    assert visible.share == pytest.approx(pairs / (len(chosen) * causal.sum()), abs=1e-12)
    assert visible.mean_keys == pytest.approx(pairs / chosen.size, abs=1e-9)


def test_distances_and_density(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "_CHUNK", 100)
    result = statistics(dataset, length=64)
    positions = np.flatnonzero(np.isin(open_classes(dataset), class_numbers("paper")))
    gaps = np.sort(np.diff(positions))
    assert result.distances is not None
    assert result.distances.mean == pytest.approx(gaps.mean())
    assert result.distances.p50 == np.percentile(gaps, 50, method="inverted_cdf")
    assert result.distances.p95 == np.percentile(gaps, 95, method="inverted_cdf")
    assert result.distances.max == gaps[-1]
    assert result.density == len(positions) / result.tokens
    assert result.bytes_per_token == result.bytes / read_header(dataset).tokens


def test_a_class_that_never_occurs(dataset: Path) -> None:
    result = statistics(dataset, separators="fullwidth_sentence", length=64)
    assert (result.density, result.distances) == (0, None)
    assert "distance" not in format_statistics(result)


def test_options_that_make_no_sense(dataset: Path) -> None:
    with pytest.raises(UserError, match="window=0"):
        statistics(dataset, window=0)
    with pytest.raises(UserError, match=r"A length of 9,999,999 is longer than the data \([\d,]+ tokens\)"):
        statistics(dataset, length=9_999_999)
    with pytest.raises(UserError, match="Unknown separator class 'stop'"):
        statistics(dataset, separators="stop")

"""Student's t against its published table, and intervals worked out by hand."""

from __future__ import annotations

import math

import pytest

from sepllm_train.base.statistics import Interval, estimate, geometric_mean, ratio_estimate, t_quantile


@pytest.mark.parametrize(
    ("degrees", "two_sided_95", "two_sided_99"),
    [
        (1, 12.706, 63.657),
        (2, 4.303, 9.925),
        (3, 3.182, 5.841),
        (4, 2.776, 4.604),
        (5, 2.571, 4.032),
        (6, 2.447, 3.707),
        (7, 2.365, 3.499),
        (9, 2.262, 3.250),
        (10, 2.228, 3.169),
        (30, 2.042, 2.750),
        (120, 1.980, 2.617),
    ],
)
def test_quantiles_are_those_of_the_tables(degrees: int, two_sided_95: float, two_sided_99: float) -> None:
    assert t_quantile(degrees) == pytest.approx(two_sided_95, abs=6e-4)
    assert t_quantile(degrees, 0.99) == pytest.approx(two_sided_99, abs=6e-4)


def test_one_and_two_degrees_of_freedom_have_closed_forms() -> None:
    """Cauchy: tan(pi p / 2); two degrees: p sqrt(2 / (1 - p^2)), for the two-sided share p."""
    for share in (0.1, 0.5, 0.9, 0.95, 0.999):
        assert t_quantile(1, share) == pytest.approx(math.tan(math.pi * share / 2), rel=1e-9)
        assert t_quantile(2, share) == pytest.approx(share * math.sqrt(2 / (1 - share**2)), rel=1e-9)


@pytest.mark.parametrize(("degrees", "share"), [(0, 0.95), (3, 1.0), (3, 0.0)])
def test_no_quantile_where_there_is_none(degrees: int, share: float) -> None:
    with pytest.raises(ValueError, match="no quantile"):
        t_quantile(degrees, share)


def test_interval_of_a_mean() -> None:
    """1, 2, 3: standard deviation 1, so 2 +- 4.302653 / sqrt(3)."""
    found = estimate([1, 2, 3])
    assert (found.mean, found.n) == (2, 3)
    assert (found.low, found.high) == (pytest.approx(2 - 2.484138, abs=1e-6), pytest.approx(2 + 2.484138, abs=1e-6))


def test_interval_of_ratios_is_that_of_their_logarithms() -> None:
    """1, 2, 4: logarithms 0, l, 2l with l = ln 2 have mean l and deviation l; 4.302653 l / sqrt(3) = 1.721880."""
    found = ratio_estimate([1, 2, 4])
    assert found.mean == pytest.approx(2)
    assert found.low == pytest.approx(2 / math.exp(1.721880), rel=1e-5)
    assert found.high == pytest.approx(2 * math.exp(1.721880), rel=1e-5)
    turned = ratio_estimate([1, 1 / 2, 1 / 4])
    assert (turned.low, turned.high) == (pytest.approx(1 / found.high), pytest.approx(1 / found.low))


def test_product_of_two_means_by_welch_and_satterthwaite() -> None:
    """Twice three logarithms of deviation 0.1: degrees (2/3)^2 / (2 (1/3)^2 / 2) = 4, half 2.776445 sqrt(2/300)."""
    spread = [math.exp(-0.1), 1.0, math.exp(0.1)]
    found = ratio_estimate([2 * ratio for ratio in spread], spread)
    assert found.mean == pytest.approx(2)
    assert found.high == pytest.approx(2 * math.exp(0.226696), rel=1e-5)
    # Without spread in the one, what is left is the interval of the other.
    alone = ratio_estimate([2.0, 2.0], spread)
    assert alone.high == pytest.approx(2 * ratio_estimate(spread).high)
    assert ratio_estimate([2.0], spread) == Interval(2.0, None, None, 1)


def test_what_an_interval_excludes() -> None:
    assert not estimate([3.0]).excludes(1)
    assert not estimate([0.9, 1.0, 1.2]).excludes(1)
    assert estimate([1.1, 1.11, 1.12]).excludes(1)
    assert estimate([2.0, 2.0]).excludes(1)
    assert not ratio_estimate([1.0, 1 + 1e-13]).excludes(1), "two equal counts, rounded"


def test_geometric_means_of_bounds() -> None:
    assert geometric_mean([2, 8]) == pytest.approx(4)
    assert geometric_mean([0.0, 8]) == 0
    assert geometric_mean([2, math.inf]) == math.inf

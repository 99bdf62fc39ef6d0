"""Means with 95% intervals by Student's t, for the few values that seeds or turns of a timing give.

For n values with mean m and sample standard deviation s the interval is m +- t s / sqrt(n), t being the quantile of
Student's distribution with n - 1 degrees of freedom that leaves 2.5% on either side (NIST/SEMATECH e-Handbook of
Statistical Methods, 1.3.5.2; of paired observations 7.3.1.1). Ratios are averaged as logarithms: the mean is the
geometric one, and a and b are as far from 1 as 1/a and 1/b (Bland and Altman, BMJ 312:1153, 1996).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

CONFIDENCE = 0.95
# An interval this close to no difference is one of equal counts that were rounded.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Estimate:
    """Mean of `n` values, and its interval; `low` and `high` are None for one value, which carries no interval."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def excludes(self, value: float) -> bool:
        """Whether there is an interval and `value` is not in it."""
        if self.low is None or self.high is None:
            return False
        return self.low > value + ROUNDING or self.high < value - ROUNDING


def estimate(values: Sequence[float]) -> Estimate:
    """Arithmetic mean of at least one value, with its interval."""
    return _estimate([values])


def ratio_estimate(*groups: Sequence[float]) -> Estimate:
    """Geometric mean of positive ratios, with its interval.

    Of several groups of independent ratios it is the product of their means: variances of the logarithms add, with
    the degrees of freedom of Welch and Satterthwaite (NIST e-Handbook 1.3.5.3) rounded down. A group of one ratio
    leaves the product without an interval. `n` is the size of the first group.
    """
    logs = _estimate([[math.log(ratio) for ratio in group] for group in groups])
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Estimate(math.exp(logs.mean), low, high, logs.n)


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean; 0 if a value is 0, infinite if one is infinite."""
    if 0 in values:
        return 0.0
    return math.exp(fmean(math.log(value) for value in values))


def _estimate(groups: Sequence[Sequence[float]]) -> Estimate:
    """Sum of the means of independent groups."""
    mean = math.fsum(fmean(group) for group in groups)
    if min(len(group) for group in groups) < 2:
        return Estimate(mean, None, None, len(groups[0]))
    squares = [variance(group) / len(group) for group in groups]
    weight = sum(square**2 / (len(group) - 1) for square, group in zip(squares, groups, strict=True))
    degrees = sum(squares) ** 2 / weight if weight > 0 else min(len(group) for group in groups) - 1
    half = t_quantile(max(1, math.floor(degrees + ROUNDING))) * math.sqrt(sum(squares))
    return Estimate(mean, mean - half, mean + half, len(groups[0]))


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t that Student's distribution with `degrees` of freedom stays within, on both sides, with `confidence`.

    Raises ValueError unless degrees >= 1 and 0 < confidence < 1.
    """
    if degrees < 1 or not 0 < confidence < 1:
        raise ValueError(f"no quantile of Student's t for {degrees} degrees of freedom and confidence {confidence}")
    low, high = 0.0, math.pi / 2
    # The share grows with the angle; 60 halvings leave less than a rounding error of it.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _share_within(angle: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) tan(angle)), the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(odd, degrees - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * cosine**2
    return 2 / math.pi * (angle + sine * total) if odd else sine * total

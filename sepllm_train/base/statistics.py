"""Means with their uncertainty: Student's 95% intervals over few values, and standard errors over samples of text.

For n values with mean m and sample standard deviation s the interval is m +- t s / sqrt(n), t being the quantile of
Student's distribution with n - 1 degrees of freedom that leaves 2.5% on either side (NIST/SEMATECH e-Handbook of
Statistical Methods, 1.3.5.2; of paired observations 7.3.1.1). Ratios are averaged as logarithms: the mean is the
geometric one, and a and b are as far from 1 as 1/a and 1/b (Bland and Altman, BMJ 312:1153, 1996).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, variance
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

CONFIDENCE = 0.95
# An interval this close to no difference is one of equal counts that were rounded.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Interval:
    """Mean of `n` values, and its interval; `low` and `high` are None for one value, which carries no interval."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def excludes(self, value: float) -> bool:
        """True if there is an interval and `value` lies outside."""
        if self.low is None or self.high is None:
            return False
        return self.low > value + ROUNDING or self.high < value - ROUNDING


def estimate(values: Sequence[float]) -> Interval:
    """Arithmetic mean of at least one value, with its interval."""
    return _estimate([values])


def ratio_estimate(*groups: Sequence[float]) -> Interval:
    """Geometric mean of positive ratios, with its interval.

    Of several groups of independent ratios it is the product of their means: variances of the logarithms add, with
    the degrees of freedom of Welch and Satterthwaite (NIST e-Handbook 1.3.5.3) rounded down. A group of one ratio
    leaves the product without an interval. `n` is the size of the first group.
    """
    logs = _estimate([[math.log(ratio) for ratio in group] for group in groups])
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Interval(math.exp(logs.mean), low, high, logs.n)


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean; 0 if a value is 0, infinite if one is infinite."""
    if 0 in values:
        return 0.0
    return math.exp(fmean(math.log(value) for value in values))


def _estimate(groups: Sequence[Sequence[float]]) -> Interval:
    """Sum of the means of independent groups."""
    mean = math.fsum(fmean(group) for group in groups)
    if min(len(group) for group in groups) < 2:
        return Interval(mean, None, None, len(groups[0]))
    squares = [variance(group) / len(group) for group in groups]
    weight = sum(square**2 / (len(group) - 1) for square, group in zip(squares, groups, strict=True))
    degrees = sum(squares) ** 2 / weight if weight > 0 else min(len(group) for group in groups) - 1
    half = t_quantile(max(1, math.floor(degrees + ROUNDING))) * math.sqrt(sum(squares))
    return Interval(mean, mean - half, mean + half, len(groups[0]))


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


class Estimate(NamedTuple):
    """A mean and its standard error; the error is nan for fewer than two samples, both without any token."""

    mean: float
    error: float


@dataclass(frozen=True)
class Losses:
    """Losses of the tokens of some samples under one attention pattern.

    `nats` f32 [N, S], loss of each prediction; `pairs` i64 [N], visible (query, key) pairs of each sample summed over
    layers; `causal_pairs`, what the pairs of one sample would be if all layers were dense; `counted` bool [N, S], the
    predictions that count, None for all.
    """

    nats: Tensor
    pairs: Tensor
    causal_pairs: int
    counted: Tensor | None = None

    @property
    def attended_share(self) -> float:
        """Visible pairs over causal ones, over all layers and samples."""
        return int(self.pairs.sum()) / (self.causal_pairs * len(self.pairs))

    def mean(self, mask: Tensor | None = None) -> Estimate:
        """Mean loss of the predictions that count, of those in `mask` (bool [N, S])."""
        return token_mean(self.nats, both(mask, self.counted))

    def change(self, reference: Losses, mask: Tensor | None = None) -> Estimate:
        """Mean of the difference to the losses of the same predictions in `reference`; `mask` as in `mean`."""
        return token_mean(self.nats - reference.nats, both(mask, self.counted))

    def places(self, start: int, stop: int) -> Losses:
        """Losses of predictions `start` to `stop` - 1 of each sample."""
        counted = None if self.counted is None else self.counted[:, start:stop]
        return replace(self, nats=self.nats[:, start:stop], counted=counted)


def both(mask: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The entries in both of two masks, of which None has all."""
    return other if mask is None else mask if other is None else mask & other


def token_mean(values: Tensor, mask: Tensor | None = None) -> Estimate:
    """Mean of `values` [N, S] over the tokens of `mask` (bool [N, S]; all without one), and its error over samples.

    The mean is a ratio of two sums over samples, values and tokens, so its error is that of `ratio_of_sums`. With equal
    counts it is the standard deviation of the samples' means over sqrt(N). Samples count as independent, which those
    of one document are not quite.
    """
    values = values.double()
    counts = (values.new_ones(values.shape) if mask is None else mask.double()).sum(-1)
    return ratio_of_sums((values if mask is None else values * mask).sum(-1), counts)


def ratio_of_sums(above: Tensor, below: Tensor) -> Estimate:
    """Sum of `above` [N] over sum of `below` [N], one entry of each a sample, and its error over samples.

    The error is that of a ratio estimator (Cochran, Sampling Techniques, section 6), which is the delta method's: with
    r_i = above_i - ratio * below_i it is sqrt(N / (N - 1) * sum of r_i^2) / |sum of below|.
    """
    total, samples = float(below.sum()), len(below)
    if total == 0:
        return Estimate(math.nan, math.nan)
    ratio = float(above.sum()) / total
    if samples < 2:
        return Estimate(ratio, math.nan)
    residual = float(((above - ratio * below) ** 2).sum())
    return Estimate(ratio, math.sqrt(samples / (samples - 1) * residual) / abs(total))

"""Means over tokens with standard errors over samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Estimate(NamedTuple):
    """A mean and its standard error; the error is nan for fewer than two samples, both without any token."""

    mean: float
    error: float


@dataclass(frozen=True)
class Losses:
    """Losses of the tokens of some samples under one attention pattern.

    `nats` f32 [N, S], loss of each prediction; `pairs` i64 [N], visible (query, key) pairs of each sample summed over
    layers; `causal_pairs`, what the pairs of one sample would be if all layers were dense.
    """

    nats: Tensor
    pairs: Tensor
    causal_pairs: int

    @property
    def attended_share(self) -> float:
        """Visible pairs over causal ones, over all layers and samples."""
        return int(self.pairs.sum()) / (self.causal_pairs * len(self.pairs))


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

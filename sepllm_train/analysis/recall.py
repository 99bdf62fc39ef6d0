"""Far-recall tokens: those that repeat a bigram whose last occurrence lies outside of the window."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def recall_distance(tokens: Tensor, labels: Tensor) -> Tensor:
    """Tokens back to the last occurrence of each predicted bigram: i64 [B, S], 0 where it is the first.

    tokens, labels: i64 [B, S], labels[b, i] being the token after tokens[b, i]. Write x for the S + 1 tokens of a
    sequence. Entry i is about the prediction of x[t], t = i + 1, and is t - u for the largest u < t with
    (x[u-1], x[u]) = (x[t-1], x[t]), u >= 1. Document ends are not looked at: a sequence is what the model is given.
    """
    pairs = torch.stack((tokens, labels), -1).cpu().numpy()
    distance = np.zeros(pairs.shape[:2], dtype=np.int64)
    for row, bigrams in enumerate(pairs):
        _, kind = np.unique(bigrams, axis=0, return_inverse=True)
        order = np.argsort(kind.reshape(-1), kind="stable")
        same = np.diff(kind.reshape(-1)[order]) == 0
        distance[row, order[1:][same]] = np.diff(order)[same]
    return torch.from_numpy(distance)


def far_recall(tokens: Tensor, labels: Tensor, window: int) -> Tensor:
    """Which predictions are far recall, bool [B, S]: the last occurrence of the bigram is more than `window` back.

    Token t counts when (x[t-1], x[t]) occurred before in the same sequence and its most recent occurrence, ending at
    u, has t - u > window. The prediction of x[t] is made by query t - 1, so x[u] is then outside of a window of
    `window` tokens, the query included. See `recall_distance` for shapes.
    """
    return recall_distance(tokens, labels) > window


def stacked_reach(window: int, layers: int) -> int:
    """Largest distance t - u at which `layers` windows one on top of the other still carry x[u] to query t - 1.

    Each layer carries a key at most window - 1 tokens on. From further away the windows alone bring nothing: that takes
    a separator, an initial token or a full layer.
    """
    return layers * (window - 1) + 1

"""Losses of a trained model, token by token, under the attention pattern of training or another one.

Far-recall tokens repeat a bigram whose last occurrence lies outside of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sep_attention import attended_pairs
from torch import Tensor

from sepllm_train.base.statistics import Losses
from sepllm_train.config.schema import require
from sepllm_train.distributed.launch import alone
from sepllm_train.model.attention import SeparatorAttention
from sepllm_train.model.gpt import SepGPTModel
from sepllm_train.model.pattern import AttentionPattern
from sepllm_train.runs.held_out import text_of
from sepllm_train.runs.open import TrainedRun

Advance = Callable[[], object]
# The paper's n, where a model has no window of its own.
DEFAULT_WINDOW = 64


def core_attentions(model: SepGPTModel) -> list[SeparatorAttention]:
    """The attention of each layer of a model on one pipeline stage, from the first."""
    return [layer.self_attention.core_attention for layer in model.decoder.layers]


@contextmanager
def attending(model: SepGPTModel, pattern: AttentionPattern) -> Iterator[None]:
    """Let a model attend by another pattern inside the block; its plans must be those of `pattern`.

    Weights, learned sinks and query-key norms stay. Raises ValueError for a pattern of another number of layers.
    """
    cores = core_attentions(model)
    before = [core.layer for core in cores]
    try:
        for core, layer in zip(cores, pattern.layers, strict=True):
            core.layer = layer
        yield
    finally:
        for core, layer in zip(cores, before, strict=True):
            core.layer = layer


@torch.no_grad()
def evaluate(
    model: SepGPTModel,
    pattern: AttentionPattern,
    dataset: Any,
    samples: int,
    advance: Advance = lambda: None,
) -> Losses:
    """Losses of the first `samples` samples of `dataset`, one forward pass each, in the precision of the weights.

    Those count that count in training and validation. Calls `advance` after each. Raises UserError for more samples
    than there are.
    """
    require(
        1 <= samples <= len(dataset), f"{samples} samples were asked for, and there are {len(dataset):,} held-out ones."
    )
    device = next(model.parameters()).device
    nats, pairs, masks = [], [], []
    with attending(model, pattern):
        for number in range(samples):
            sample = {key: value[None].to(device) for key, value in dataset[number].items()}
            plan = pattern.plan(sample["separator_class"], sample["document_start"])
            positions = pattern.positions(sample["document_start"])
            nats.append(model(sample["tokens"], plan, labels=sample["labels"], positions=positions).float().cpu())
            masks += [sample["loss_mask"].cpu()] if "loss_mask" in sample else []
            pairs.append(sum(int(attended_pairs(plan, layer.window, layer.horizons)) for layer in pattern.layers))
            advance()
    length = nats[0].shape[1]
    causal_pairs = len(pattern.layers) * length * (length + 1) // 2
    return Losses(torch.cat(nats), torch.tensor(pairs), causal_pairs, torch.cat(masks) if masks else None)


def usual_window(pattern: AttentionPattern) -> int:
    """Largest window of the layers that are not full; the paper's 64 where all of them are."""
    return max((layer.window for layer in pattern.layers if not layer.full), default=DEFAULT_WINDOW)


def evaluate_run(
    run: TrainedRun,
    samples: int | None = None,
    *,
    recall_window: int | None = None,
    advance: Advance = lambda: None,
) -> dict[str, Any]:
    """Held-out losses of a run's checkpoint under its own pattern, with standard errors over samples.

    samples: as in `TrainedRun.sample_count`. recall_window: n of the far-recall tokens, None for the run's own (64 for
    a dense one): give runs that are compared the same. Works in or outside of `alone`.

    Returns loss, far_recall_loss and other_loss in nats per token, each with an `_error`; far_recall_share of the
    tokens; attended_share of the causal triangle; recall_window; tokens that count; and what `TrainedRun.describe`
    gives. Raises UserError as `TrainedRun.validation` and `TrainedRun.load_model` do.
    """
    require(recall_window is None or recall_window >= 1, f"recall_window={recall_window} must be at least 1.")
    with alone():
        count = run.sample_count(samples)
        losses = evaluate(run.load_model(), run.pattern, run.validation, count, advance)
        text = text_of(run.validation, count)
    window = recall_window or usual_window(run.pattern)
    far = far_recall(text["tokens"], text["labels"], window)
    result: dict[str, Any] = {}
    for name, mask in (("", None), ("far_recall_", far), ("other_", ~far)):
        result[f"{name}loss"], result[f"{name}loss_error"] = losses.mean(mask)
    return {
        **result,
        "far_recall_share": float(far.double().mean()),
        "attended_share": losses.attended_share,
        "recall_window": window,
        "tokens": losses.nats.numel() if losses.counted is None else int(losses.counted.sum()),
        **run.describe(count),
    }


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
    """Mark far-recall predictions, bool [B, S]: the last occurrence of the bigram is more than `window` back.

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

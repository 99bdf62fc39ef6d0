"""Patterns at equal keys: the interval, the window and the share of separators that keep as many as another pattern.

Shape letters: N samples, S tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sep_attention import keys_per_query
from torch import Tensor

from data_prep.separators import CLASSES
from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import AttentionConfig
from sepllm_train.model.pattern import AttentionPattern, resolve_pattern, tiers_of_classes
from sepllm_train.training.facts import attended_pairs_of_layers, sample_plan

Counts = NDArray[np.int64]
Sample = dict[str, torch.Tensor]


@dataclass(frozen=True)
class KeptKeys:
    """Keys that tokens see over all keys up to them, over layers and samples.

    `last`: at the last token of a sequence, which is what a cache has to hold there (the paper's runtime KV at the last
    token of a prompt). `mean`: the mean over all tokens of each one's share. `attended`: visible pairs over those of
    the causal triangle.
    """

    last: float
    mean: float
    attended: float


@dataclass(frozen=True)
class Match:
    """An interval or a window, `value`, in tokens; the configuration that has it in the place of separators; and the
    share of the keys that the last token keeps: `kept` with it, `wanted` under the pattern that it is matched to."""

    value: int
    attention: AttentionConfig
    kept: float
    wanted: float


def kept_keys(pattern: AttentionPattern, text: dict[str, Any]) -> KeptKeys:
    """Count what tokens see of samples (`separator_class` u8, `document_start` i32 [N, S]) under a pattern."""
    keys = _keys(pattern, text)
    every = len(pattern.layers) * torch.arange(1, _length(text) + 1)
    share = keys.double() / every
    attended = int(keys.sum()) / (int(every.sum()) * len(keys))
    return KeptKeys(float(share[:, -1].mean()), float(share.mean()), attended)


def matching_interval(attention: AttentionConfig, layers: int, text: dict[str, Any]) -> Match:
    """The interval D at which every D-th token in the place of separators keeps as many keys as nearly as may be.

    Kept are the keys that the last tokens of the samples see, `text` as in `kept_keys`; window, initial tokens and full
    layers stay. Every D from 1 to S is counted; of equally near ones the smallest is taken. Raises UserError for
    another pattern than sep.
    """
    fixed = replace(_bare(attention), pattern="fixed", interval=1)
    intervals = np.arange(1, _length(text) + 1)
    kept = np.zeros_like(intervals)
    for layer in resolve_pattern(fixed, layers).layers:
        kept += keys_at_last(text, layer.window, attention, intervals)
    value, match = _nearest(intervals, kept, attention, layers, text)
    return Match(value, replace(fixed, interval=value), *match)


def matching_window(attention: AttentionConfig, layers: int, text: dict[str, Any]) -> Match:
    """The window n at which neighbours without separators keep as many keys as nearly as may be.

    As `matching_interval`; the window is that of every layer that is not full.
    """
    streaming = replace(_bare(attention), pattern="streaming")
    windows = np.arange(1, _length(text) + 1)
    kept = np.zeros_like(windows)
    for layer in resolve_pattern(streaming, layers).layers:
        kept += keys_at_last(text, layer.window if layer.full else windows, attention)
    value, match = _nearest(windows, kept, attention, layers, text)
    return Match(value, replace(streaming, window=value), *match)


def keys_at_last(
    text: dict[str, Any], window: int | Counts, attention: AttentionConfig, interval: int | Counts | None = None
) -> Counts:
    """Keys that the last tokens of all samples see, summed: one for each entry of `window` or `interval` (both [K]).

    Seen are the initial tokens of `attention`, the window, and every interval-th token of the sequence: at D the
    multiples of D before the window number ceil(w / D) - ceil(i / D), w being the first token of the window and i the
    first one that is not initial.
    """
    length = _length(text)
    start = text["document_start"][:, -1].numpy().astype(np.int64) * attention.separate_documents
    near = np.maximum(start, length - np.asarray(window)[..., None])
    initial = np.minimum(start + attention.initial_tokens, near)
    keys = length - near + initial - start
    if interval is not None:
        every = np.asarray(interval)[..., None]
        keys = keys - (-near // every) + (-initial // every)
    return keys.sum(-1)


@dataclass(frozen=True)
class KeepShare:
    """`share` of the separators to keep for ever, so that as many keys are visible as under the given horizons.

    Mean visible keys per token and layer: `horizons` under them, `neighbours` without separators, `forever` with all
    separators for ever. `attention` is the thinned configuration.
    """

    share: float
    horizons: float
    neighbours: float
    forever: float
    attention: AttentionConfig


def matching_keep_share(attention: AttentionConfig, layers: int, samples: Iterable[Sample]) -> KeepShare:
    """Find the keep_share at which thinned separators show as many keys as `attention` does on `samples`.

    `samples` have natural separators, as `build_datasets` gives them under placement=natural. Visible pairs are counted
    exactly. A separator that stays adds its pairs whatever others do, so their expected number is linear in the share:
    share = (pairs under the horizons - pairs without separators) / (pairs of separators for ever - pairs without).
    Raises UserError when there are no separators beyond the window, and for another pattern or placement.
    """
    if attention.pattern != "sep" or attention.placement != "natural":
        raise UserError(
            "a keep_share is matched to attention.pattern=sep with attention.placement=natural, not to "
            f"{attention.pattern} and {attention.placement}."
        )
    _, tier = tiers_of_classes(attention)
    forever = replace(attention, separators=[entry.name for entry in CLASSES if tier[entry.number]])
    patterns = [
        resolve_pattern(config, layers) for config in (attention, replace(attention, pattern="streaming"), forever)
    ]
    totals, tokens = [0, 0, 0], 0
    for sample in samples:
        tokens += layers * len(sample["separator_class"])
        totals = [total + _pairs(pattern, sample) for total, pattern in zip(totals, patterns, strict=True)]
    given, nearest, all_kept = totals
    if given == nearest:
        raise UserError(
            "under these horizons no separator is visible beyond the window on this data: no share of them is as few; "
            "attention=streaming has none."
        )
    share = (given - nearest) / (all_kept - nearest)
    thinned = replace(forever, placement="thinned", keep_share=share)
    return KeepShare(share, given / tokens, nearest / tokens, all_kept / tokens, thinned)


def mean_keys(attention: AttentionConfig, layers: int, samples: Iterable[Sample]) -> float:
    """Mean visible keys per token and layer of samples that are placed already."""
    pattern, pairs, tokens = resolve_pattern(attention, layers), 0, 0
    for sample in samples:
        tokens += layers * len(sample["separator_class"])
        pairs += _pairs(pattern, sample)
    return pairs / tokens


def _keys(pattern: AttentionPattern, text: dict[str, Any]) -> Tensor:
    """i64 [N, S]: keys that each token sees, summed over layers."""
    plan = pattern.plan(text["separator_class"], text["document_start"])
    keys = torch.zeros_like(plan.tier, dtype=torch.int64)
    for layer, count in Counter(pattern.layers).items():
        keys += count * keys_per_query(plan, layer.window, layer.horizons)
    return keys


def _nearest(
    values: Counts, kept: Counts, attention: AttentionConfig, layers: int, text: dict[str, Any]
) -> tuple[int, tuple[float, float]]:
    """The value whose keys are nearest to those of `attention`; its kept share and the wanted one."""
    wanted = int(_keys(resolve_pattern(attention, layers), text)[:, -1].sum())
    best = int(np.argmin(np.abs(kept - wanted)))
    every = layers * _length(text) * len(text["document_start"])
    return int(values[best]), (int(kept[best]) / every, wanted / every)


def _bare(attention: AttentionConfig) -> AttentionConfig:
    """The configuration with its separators where the text has them. Raises UserError for another pattern than sep."""
    if attention.pattern != "sep":
        raise UserError(f"an interval and a window are matched to attention.pattern=sep, not to {attention.pattern}.")
    return replace(attention, placement="natural", keep_share=None)


def _length(text: dict[str, Any]) -> int:
    """S."""
    return int(text["separator_class"].shape[1])


def _pairs(pattern: AttentionPattern, sample: Sample) -> int:
    """Visible pairs of one sample, summed over layers."""
    return attended_pairs_of_layers(pattern, sample_plan(pattern, sample))

"""The share of separators at which random thinning costs as many keys as horizons do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from data_prep.separators import CLASSES
from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import AttentionConfig
from sepllm_train.model.pattern import AttentionPattern, resolve_pattern, tiers_of_classes
from sepllm_train.training.report import attended_pairs_of_layers, sample_plan

Sample = dict[str, torch.Tensor]


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


def _pairs(pattern: AttentionPattern, sample: Sample) -> int:
    """Visible pairs of one sample, summed over layers."""
    return attended_pairs_of_layers(pattern, sample_plan(pattern, sample))

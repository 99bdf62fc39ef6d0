"""Attention patterns that differ from another in one thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from sep_attention import AttentionPlan, attended_pairs

from data_prep.separators import CLASSES
from sepllm_train.config.overrides import values_of
from sepllm_train.config.schema import AttentionConfig, require
from sepllm_train.config.stored import from_mapping
from sepllm_train.model.pattern import AttentionPattern, LayerPattern, resolve_pattern

# Part of the weights or of training alone, so no other value can be tried.
FIXED = ("sink", "qk_norm", "backend", "window_choices")
CLASS_NAMES = {entry.number: entry.name for entry in CLASSES}
CLASS_NUMBERS = {name: number for number, name in CLASS_NAMES.items()}


def base_attention(trained: AttentionConfig, overrides: Sequence[str]) -> AttentionConfig:
    """The attention from which variations are made: that of training with `overrides` (KEY=VALUE of the group).

    Without overrides a dense model gets the paper's: 3 initial tokens, n = 64, the nine separators. Raises UserError
    for a key or value that does not exist, or that belongs to the weights. Windows are not drawn: training alone does.
    """
    trained = replace(trained, window_choices=None)
    if not overrides:
        if trained.pattern != "dense":
            return trained
        return replace(trained, pattern="sep", initial_tokens=3, window=64, separators="paper", full_layers="none")
    known = [name for name in asdict(trained) if name not in FIXED]
    words = [override.removeprefix("attention.") for override in overrides]
    for override, word in zip(overrides, words, strict=True):
        key, equals, _ = word.partition("=")
        require(
            bool(equals) and key in known, f"--attention {override}: write KEY=VALUE with one of {', '.join(known)}."
        )
    values = {**asdict(trained), **values_of(AttentionConfig, words, "--attention")}
    remedy = "sepllm pretrain --keys attention explains them"
    return from_mapping(AttentionConfig, values, "--attention", remedy, group="attention.")


def classes_of(pattern: AttentionPattern) -> list[int]:
    """Numbers of the separator classes that a pattern keeps beyond its window."""
    return [number for number in CLASS_NAMES if pattern.tier_of_class[number]]


def without_classes(pattern: AttentionPattern, classes: Sequence[int]) -> AttentionPattern:
    """`pattern` with the tokens of these classes ordinary ones; they stay visible as neighbours and initial tokens."""
    table = pattern.tier_of_class.copy()
    table[np.asarray(classes, dtype=np.int64)] = 0
    return replace(pattern, tier_of_class=table)


def with_window(pattern: AttentionPattern, window: int) -> AttentionPattern:
    """`pattern` with n = `window` in every layer that is not full. Raises UserError for a window below 1."""
    require(window >= 1, f"a window of {window} is none: it counts the token itself, so it is at least 1.")
    layers = tuple(layer if layer.full else LayerPattern(window, layer.horizons) for layer in pattern.layers)
    return replace(pattern, layers=layers)


def dense_pattern(trained: AttentionConfig, layers: int) -> AttentionPattern:
    """Plain causal attention in every layer, over documents as in training."""
    return resolve_pattern(replace(trained, pattern="dense", window_choices=None), layers)


def pairs_of(pattern: AttentionPattern, text: dict[str, Any]) -> int:
    """Visible pairs of samples (`separator_class`, `document_start` [N, S]), summed over the model's layers."""
    return _pairs(pattern, pattern.plan(text["separator_class"], text["document_start"]))


def equal_pairs_without_separators(pattern: AttentionPattern, text: dict[str, Any]) -> tuple[AttentionPattern, int]:
    """The pattern without separators whose window gives the number of visible pairs nearest to that of `pattern`.

    `text` as in `pairs_of`; full layers stay. Gives the pattern and its window. The pairs grow with the window, so it
    is found by bisection; one token more or less changes them by up to S pairs per layer and sample.
    """
    bare = without_classes(pattern, classes_of(pattern))
    plan = bare.plan(text["separator_class"], text["document_start"])
    wanted = pairs_of(pattern, text)
    low, high = 1, plan.sequence_length
    while low < high:
        middle = (low + high) // 2
        if _pairs(with_window(bare, middle), plan) < wanted:
            low = middle + 1
        else:
            high = middle
    around = (max(1, low - 1), low)
    window = min(around, key=lambda n: abs(_pairs(with_window(bare, n), plan) - wanted))
    return with_window(bare, window), window


def _pairs(pattern: AttentionPattern, plan: AttentionPlan) -> int:
    groups = {layer: pattern.layers.count(layer) for layer in pattern.layers}
    return sum(count * int(attended_pairs(plan, *_reach(layer)).sum()) for layer, count in groups.items())


def _reach(layer: LayerPattern) -> tuple[int, tuple[int, ...]]:
    return layer.window, layer.horizons

"""From an exported model's pattern back to attention.* of a configuration: separators by class in place of by id."""

from __future__ import annotations

from typing import Any

import numpy as np
from sep_attention import FOREVER

from data_prep.separators import CLASSES
from sepllm_train.config.schema import AttentionConfig
from sepllm_train.generation.pattern import TokenPattern


def attention_of(pattern: TokenPattern, classes: np.ndarray | None) -> AttentionConfig | None:
    """The configuration that gives `pattern`, or None when no choice of separator classes does.

    classes: u8 [vocabulary], the separator class of each entry; None when that is not known.
    """
    settings: dict[str, Any] = {
        "initial_tokens": pattern.initial,
        "separate_documents": pattern.end_of_document is not None,
    }
    finite = [window for window in pattern.windows if window < FOREVER]
    if not finite:
        return AttentionConfig(pattern="dense", **settings)
    settings["full_layers"] = [n for n, window in enumerate(pattern.windows) if window >= FOREVER] or "none"
    # A full layer's window is not looked at.
    windows = [window if window < FOREVER else finite[0] for window in pattern.windows]
    settings["window"] = windows[0] if len(set(windows)) == 1 else windows
    if pattern.interval is not None:
        return AttentionConfig(pattern="fixed", interval=pattern.interval, **settings)
    if not pattern.separators:
        return AttentionConfig(pattern="streaming", **settings)
    groups = None if classes is None else _groups(pattern, classes)
    return None if groups is None else AttentionConfig(pattern="sep", separators=groups, **settings)


def _groups(pattern: TokenPattern, classes: np.ndarray) -> list[Any] | None:
    """Value of attention.separators, or None when a class has tokens in two tiers, or tokens of none are in one."""
    tiers = pattern.tier_of_token.numpy()
    if len(tiers) != len(classes):
        return None
    names: dict[int, list[str]] = {}
    for entry in CLASSES:
        (tier, *others) = np.unique(tiers[classes == entry.number]).tolist() or [0]
        if others:
            return None
        if tier:
            names.setdefault(tier, []).append(entry.name)
    if tiers[classes == 0].any():
        return None
    if set(names) == {1}:
        return names[1]
    horizons = {tier: "forever" if h >= FOREVER else h for tier, h in enumerate(pattern.horizons, 1)}
    return [{"classes": found, "horizon": horizons[tier]} for tier, found in sorted(names.items())]

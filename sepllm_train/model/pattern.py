"""From the attention configuration to what the attention package needs: tiers of tokens and per-layer horizons."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from sep_attention import FOREVER, AttentionPlan, build_plan
from torch import Tensor

from data_prep.separators import CLASSES, NAMED_SETS
from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import AttentionConfig

MAX_TIERS = 4
AUTO = "auto"


@dataclass(frozen=True)
class LayerPattern:
    """Visible keys of one layer: keys nearer than `window` tokens, and each tier nearer than its horizon (tokens)."""

    window: int
    horizons: tuple[int, ...]

    @property
    def full(self) -> bool:
        """True for plain causal attention."""
        return self.window >= FOREVER

    @property
    def reach(self) -> int:
        """Tokens within which any key may be visible; beyond, only permanent (global) keys are."""
        return max(self.window, *(horizon for horizon in (1, *self.horizons) if horizon < FOREVER))


@dataclass(frozen=True, eq=False)
class AttentionPattern:
    """The resolved attention of a model.

    `tier_of_class` is a uint8 table [256] from separator class to tier; tier 1 is permanent (global) and also holds the
    initial tokens, higher tiers have finite, falling horizons.
    """

    layers: tuple[LayerPattern, ...]
    tier_of_class: np.ndarray
    num_tiers: int
    initial_tokens: int
    interval: int | None
    separate_documents: bool
    restart_positions: bool

    @property
    def dense(self) -> bool:
        """True when every layer is plain causal attention over one document."""
        return not self.separate_documents and all(layer.full for layer in self.layers)

    @cache  # noqa: B019  one small tensor per device, for as long as the process lives
    def _table_on(self, device: torch.device) -> Tensor:
        """The table on a device; copied once, since a copy from the host would stall a GPU."""
        return torch.from_numpy(self.tier_of_class).to(device)

    def plan(self, classes: Tensor, document_start: Tensor) -> AttentionPlan:
        """Attention plan of one micro-batch.

        `classes`: u8 [B, S], separator class of each token. `document_start`: i32 [B, S], position in the sequence
        at which the token's document starts. Both on the device the plan is wanted on.
        """
        if self.interval is not None:
            position = torch.arange(classes.shape[1], device=classes.device)
            tier = (position % self.interval == 0).to(torch.uint8).expand(classes.shape).contiguous()
        else:
            tier = self._table_on(classes.device)[classes.long()]
        return build_plan(
            tier,
            initial_tokens=self.initial_tokens,
            document_start=document_start if self.separate_documents else None,
            num_tiers=self.num_tiers,
        )

    def positions(self, document_start: Tensor) -> Tensor | None:
        """Rotary positions i64 [B, S], counted from the first token of each document in the sequence; None where they
        are those of the sequence. `document_start` as in `plan`."""
        if not self.restart_positions:
            return None
        return torch.arange(document_start.shape[1], device=document_start.device) - document_start


def resolve_pattern(attention: AttentionConfig, layers: int) -> AttentionPattern:
    """Resolve the configuration for a model of `layers` layers.

    Raises UserError for an unknown separator class, a wrong number of windows, a layer that does not exist, more
    than four tiers, or separators=auto, for which `data/choice.py` puts the classes that suit the data.
    """
    horizons, table = tiers_of_classes(attention)
    windows = attention.window if isinstance(attention.window, list) else [attention.window] * layers
    if len(windows) != layers:
        raise UserError(f"attention.window lists {len(windows)} windows for a model of {layers} layers.")
    full = set(range(layers)) if attention.pattern == "dense" else _full_layers(attention.full_layers, layers)
    return AttentionPattern(
        layers=tuple(LayerPattern(FOREVER if i in full else windows[i], horizons) for i in range(layers)),
        tier_of_class=table,
        num_tiers=len(horizons),
        initial_tokens=0 if attention.pattern == "dense" else attention.initial_tokens,
        interval=attention.interval if attention.pattern == "fixed" else None,
        separate_documents=attention.separate_documents,
        restart_positions=attention.restart_positions,
    )


def _full_layers(full_layers: Any, layers: int) -> set[int]:
    """Numbers of the layers that attend fully."""
    if isinstance(full_layers, str):
        named = {"none": set[int](), "first": {0}, "first_last": {0, layers - 1}}
        if full_layers not in named:
            raise UserError(
                f"attention.full_layers={full_layers} is unknown: none, first, first_last or a list such as [0,5,11]."
            )
        return named[full_layers]
    if not isinstance(full_layers, list):
        raise UserError(f"attention.full_layers={full_layers} must be none, first, first_last or a list like [0,5].")
    wrong = [n for n in full_layers if type(n) is not int or not 0 <= n < layers]
    if wrong:
        raise UserError(f"attention.full_layers names layer {wrong[0]}; this model has layers 0 to {layers - 1}.")
    return set(full_layers)


def tiers_of_classes(attention: AttentionConfig) -> tuple[tuple[int, ...], np.ndarray]:
    """Horizon of each tier (tier 1 first, the permanent one) and the u8 table [256] from separator class to tier.

    Raises UserError as `resolve_pattern` does.
    """
    table = np.zeros(256, dtype=np.uint8)
    if attention.pattern != "sep":
        return (FOREVER,), table
    groups: dict[int, set[int]] = {FOREVER: set()}
    for classes, horizon in _separator_groups(attention.separators):
        groups.setdefault(horizon, set()).update(classes)
    horizons = tuple(sorted(groups, reverse=True))
    if len(horizons) > MAX_TIERS:
        raise UserError(
            f"attention.separators has {len(horizons)} different horizons, the for-ever one included: "
            f"at most {MAX_TIERS} are possible."
        )
    # From the nearest horizon to the farthest, so that a class named twice keeps the larger one.
    for tier in range(len(horizons), 0, -1):
        table[list(groups[horizons[tier - 1]])] = tier
    return horizons, table


def _separator_groups(separators: Any) -> list[tuple[set[int], int]]:
    """(class numbers, horizon in tokens) of each entry of attention.separators."""
    if separators == AUTO:
        raise UserError(
            "attention.separators=auto is chosen from the statistics of the data: training does that when it starts, "
            "and what has no data needs the class names, which run.json and config.yaml of the run hold."
        )
    if not isinstance(separators, list):
        return [(_class_numbers([separators]), FOREVER)]
    if not any(isinstance(entry, dict) for entry in separators):
        return [(_class_numbers(separators), FOREVER)]
    groups = []
    for entry in separators:
        if not isinstance(entry, dict) or set(entry) != {"classes", "horizon"}:
            raise UserError(
                f"attention.separators entry {entry} must be {{classes: [...], horizon: TOKENS or forever}}."
            )
        horizon = FOREVER if entry["horizon"] == "forever" else entry["horizon"]
        if not isinstance(horizon, int) or horizon < 1:
            raise UserError(
                f"attention.separators horizon {entry['horizon']} must be a number of tokens of at least 1, or forever."
            )
        classes = entry["classes"] if isinstance(entry["classes"], list) else [entry["classes"]]
        groups.append((_class_numbers(classes), min(horizon, FOREVER)))
    return groups


def _class_numbers(names: list[Any]) -> set[int]:
    """Numbers of the separator classes called `names`; `paper` and the like stand for their sets."""
    by_name = {c.name: {c.number} for c in CLASSES} | {name: set(numbers) for name, numbers in NAMED_SETS.items()}
    unknown = [name for name in names if not isinstance(name, str) or name not in by_name]
    if unknown:
        raise UserError(
            f"attention.separators: unknown separator class {unknown[0]!r}; known are {', '.join(by_name)}."
        )
    return set().union(*(by_name[name] for name in names))

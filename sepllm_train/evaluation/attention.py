"""Attention of a model during an evaluation: from what is typed to a pattern or a cache on the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from sep_attention import FOREVER

from sepllm_train.base.errors import UserError
from sepllm_train.evaluation.stream_model import Opened
from sepllm_train.generation.choice import CLASSES, AttentionChoice, finite_windows
from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.generation.slots import CachePolicy
from sepllm_train.hf import (
    PatternCache,
    SepCache,
    apply_pattern,
    make_pattern,
    no_separators,
    remove_pattern,
    trained_pattern,
)
from sepllm_train.hf.caches import differences


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention bound to a model.

    Attributes:
        options: what was asked for.
        pattern: what each token sees; None for full attention. With `policies` it only tells the separators.
        policies: what a cache keeps in each layer; None where the pattern is a mask.
        generation_cache: makes the cache for generation; None for transformers' own.
        differences: what is otherwise than in training, in words.
    """

    options: AttentionChoice
    pattern: TokenPattern | None
    policies: tuple[CachePolicy, ...] | None
    generation_cache: Callable[[], Any] | None
    differences: tuple[str, ...]

    @property
    def label(self) -> str:
        """Name in results."""
        return self.options.label or self.options.name

    def install(self, model: Any) -> None:
        """Let the model attend so in forwards without a cache of ours."""
        remove_pattern(model)
        if self.pattern is not None and self.policies is None:
            apply_pattern(model, self.pattern)

    def describe(self) -> dict[str, Any]:
        """For results: the numbers in use and the pattern by token ids."""
        told: dict[str, Any] = {"name": self.options.name, "label": self.label, "differences": list(self.differences)}
        if self.policies is not None:
            used = next((policy for policy in self.policies if policy.capacity is not None), self.policies[0])
            told["cache"] = asdict(used) | {"positions": self.options.positions}
        return told | {"pattern": None if self.pattern is None else self.pattern.to_dict()}

    def __str__(self) -> str:
        if self.pattern is None:
            return f"{self.label}: every token sees all before it"
        windows = finite_windows(self.pattern)
        full = sum(window >= FOREVER for window in self.pattern.windows)
        parts = [f"initial {self.pattern.initial}", f"window {'/'.join(map(str, windows))}"]
        if self.pattern.interval is not None:
            parts.append(f"every {self.pattern.interval}th token")
        elif self.pattern.separators:
            parts.append(f"{len(self.pattern.separators)} separator tokens")
        if self.policies is not None:
            parts.append(f"cache of {self.options.capacity} keys, {self.options.separators} separators")
        if full:
            parts.append(f"{full} full layers")
        return f"{self.label}: {', '.join(parts)}"


def bind(opened: Opened, options: AttentionChoice) -> Attention:
    """The attention for a model, which attends fully until that is installed.

    Raises UserError for numbers that do not fit together or do not suit the model.
    """
    options.check()
    try:
        return _bind(opened, options)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None


def _bind(opened: Opened, options: AttentionChoice) -> Attention:
    model, trained = opened.model, trained_pattern(opened.model.config)
    if options.name == "dense":
        told = () if trained is None or trained.dense else ("full attention where training had a pattern",)
        return Attention(options, None, None, None, told)
    # Where no layer had a window, documents may have been apart: a separator pattern it was not.
    windowed = trained if finite_windows(trained) else None
    if options.name == "cache":
        return _with_cache(opened, options, windowed)
    pattern = _pattern(opened, options, windowed)
    # Generation drops the keys that the pattern will not show again; its tokens are those of the mask.
    policies = [pattern.policy(layer) for layer in range(len(pattern.windows))]
    # apply_pattern raises what does not suit the model.
    remove_pattern(apply_pattern(model, pattern))
    made = partial(_quietly, lambda: PatternCache(model, pattern))
    return Attention(options, pattern, None, made, differences(trained, pattern, policies))


def _pattern(opened: Opened, options: AttentionChoice, trained: TokenPattern | None) -> TokenPattern:
    """The pattern of `pattern`, `streaming` and `fixed`. Layers have the windows of training unless another is asked
    for, and those that training had full stay full."""
    model, chosen = opened.model, options.settled(trained)
    assert chosen.initial is not None and chosen.window is not None
    window, initial = chosen.window, chosen.initial
    if options.name in ("streaming", "fixed"):
        interval = options.interval if options.name == "fixed" else None
        pattern = no_separators(model, window=window, initial=initial, interval=interval)
    elif trained is not None and options.classes is None:
        pattern = replace(trained, initial=initial)
    else:
        pattern = make_pattern(
            model, window=window, initial=initial, tokenizer=opened.tokenizer, selection=options.classes or CLASSES
        )
    if trained is None:
        return pattern
    own = options.window
    return replace(pattern, windows=tuple(was if own is None or was >= FOREVER else own for was in trained.windows))


def _with_cache(opened: Opened, options: AttentionChoice, trained: TokenPattern | None) -> Attention:
    """SepCache, for prompts and generation alike."""
    chosen, windows = options.settled(trained), finite_windows(trained)
    own = trained is not None and trained.separators and options.classes is None
    separators = {} if own else {"tokenizer": opened.tokenizer, "selection": options.classes or CLASSES}
    settings: dict[str, Any] = {
        **{key: getattr(chosen, key) for key in ("initial", "separators", "window", "capacity")},
        "positions": options.positions,
        "full_layers": _full_layers(trained),
        **separators,
    }

    made = partial(_quietly, lambda: SepCache(opened.model, **settings))
    cache = made()
    policies = tuple(cache.policies[group] for group in cache.group_of_layer)
    settled = replace(chosen, positions=cache.positions)
    told: tuple[str, ...] = cache.differences
    if options.window is None and len(windows) > 1:
        told += (
            f"the cache has one window for all layers, {chosen.window}, the largest of {'/'.join(map(str, windows))}",
        )
    return Attention(settled, cache.pattern, policies, made, told)


def _quietly(make: Callable[[], Any]) -> Any:
    """A cache, without the warning of what is otherwise than in training: the results tell it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="training-free use", category=UserWarning)
        return make()


def _full_layers(trained: TokenPattern | None) -> list[int]:
    return [] if trained is None else [layer for layer, window in enumerate(trained.windows) if window >= FOREVER]

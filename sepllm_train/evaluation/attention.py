"""How a model attends while it is evaluated: from what is typed to a pattern or a cache on the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from sep_attention import FOREVER

from sepllm_train.errors import UserError
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
from sepllm_train.inference.pattern import TokenPattern
from sepllm_train.inference.policy import CachePolicy
from sepllm_train.streaming.model import Opened

NAMES = ("pattern", "dense", "streaming", "fixed", "cache")
# The paper's numbers for training-free use, where a model was trained with full attention.
DEFAULT_WINDOW, DEFAULT_INITIAL = 256, 3
_NUMBERS = ("initial", "window", "separators", "capacity", "interval")


@dataclass(frozen=True)
class AttentionOptions:
    """An attention by name and its numbers in tokens; None takes those of training, or the paper's.

    separators and capacity: of the cache. interval: of `fixed`. classes: separator classes, None for those of training.
    label: what results call it.
    """

    name: str = "pattern"
    initial: int | None = None
    window: int | None = None
    separators: int = 64
    capacity: int | None = None
    interval: int | None = None
    positions: str | None = None
    classes: str | None = None
    label: str = ""

    def baseline(self, text: str) -> AttentionOptions:
        """Another attention from NAME or NAME:KEY=VALUE:..., such as streaming:window=380; what it does not name is
        as here. Raises UserError."""
        name, *settings = text.split(":")
        if name not in NAMES:
            raise UserError(f"the baseline {name!r} is unknown: choose from {', '.join(NAMES)}.")
        given: dict[str, Any] = {}
        for setting in settings:
            key, _, value = setting.partition("=")
            if key in _NUMBERS and value.isdigit():
                given[key] = int(value)
            elif key in ("positions", "classes") and value:
                given[key] = value
            else:
                raise UserError(
                    f"{setting!r} in the baseline {text} is not KEY=VALUE with a whole number for one of "
                    f"{', '.join(_NUMBERS)}."
                )
        return replace(self, name=name, label=text, **given)


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

    options: AttentionOptions
    pattern: TokenPattern | None
    policies: tuple[CachePolicy, ...] | None
    generation_cache: Callable[[], Any] | None
    differences: tuple[str, ...]

    @property
    def label(self) -> str:
        """What results call it."""
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
        windows = sorted({window for window in self.pattern.windows if window < FOREVER})
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


def bind(opened: Opened, options: AttentionOptions) -> Attention:
    """The attention for a model, which attends fully until that is installed.

    Raises UserError for numbers that do not fit together or do not suit the model.
    """
    for key in ("initial", "window", "separators", "capacity", "interval"):
        value, least = getattr(options, key), 0 if key == "initial" else 1
        if value is not None and value < least:
            raise UserError(f"{key}={value} must be at least {least}.")
    try:
        return _bind(opened, options)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None


def _bind(opened: Opened, options: AttentionOptions) -> Attention:
    model, trained = opened.model, trained_pattern(opened.model.config)
    if options.name == "dense":
        told = () if trained is None or trained.dense else ("full attention where training had a pattern",)
        return Attention(options, None, None, None, told)
    if options.name == "cache":
        return _with_cache(opened, options, trained)
    pattern = _pattern(opened, options, trained)
    # Generation drops the keys that the pattern will not show again; its tokens are those of the mask.
    policies = [pattern.policy(layer) for layer in range(len(pattern.windows))]
    # apply_pattern raises what does not suit the model.
    remove_pattern(apply_pattern(model, pattern))
    made = partial(_quietly, lambda: PatternCache(model, pattern))
    return Attention(options, pattern, None, made, differences(trained, pattern, policies))


def _pattern(opened: Opened, options: AttentionOptions, trained: TokenPattern | None) -> TokenPattern:
    """The pattern of `pattern`, `streaming` and `fixed`. Layers that training had full stay full."""
    model = opened.model
    window, initial = _window(options, trained), _initial(options, trained)
    if options.name == "fixed" and options.interval is None:
        raise UserError("fixed needs --interval D: every D-th token stands for a separator.")
    if options.name in ("streaming", "fixed"):
        interval = options.interval if options.name == "fixed" else None
        pattern = no_separators(model, window=window, initial=initial, interval=interval)
    elif trained is not None and not trained.dense and options.classes is None:
        windows = trained.windows if options.window is None else _full_kept(trained, options.window)
        return replace(trained, windows=windows, initial=initial)
    else:
        pattern = make_pattern(
            model, window=window, initial=initial, tokenizer=opened.tokenizer, selection=options.classes or "paper"
        )
    return pattern if trained is None or trained.dense else replace(pattern, windows=_full_kept(trained, window))


def _with_cache(opened: Opened, options: AttentionOptions, trained: TokenPattern | None) -> Attention:
    """SepCache, for prompts and generation alike."""
    if options.capacity is None:
        raise UserError(
            "cache needs --capacity, the keys it holds at most: above initial, separators and window together."
        )
    own = trained is not None and trained.separators and options.classes is None
    separators: dict[str, Any] = {} if own else {"tokenizer": opened.tokenizer, "selection": options.classes or "paper"}
    numbers = (_initial(options, trained), options.separators, _window(options, trained), options.capacity)

    made = partial(_quietly, lambda: SepCache(opened.model, *numbers, positions=options.positions, **separators))
    cache = made()
    policies = tuple(cache.policies[group] for group in cache.group_of_layer)
    settled = replace(options, positions=cache.positions)
    return Attention(settled, cache.pattern, policies, made, cache.differences)


def _quietly(make: Callable[[], Any]) -> Any:
    """A cache, without the warning of what is otherwise than in training: the results tell it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="training-free use", category=UserWarning)
        return make()


def _window(options: AttentionOptions, trained: TokenPattern | None) -> int:
    if options.window is not None:
        return options.window
    finite = _finite(trained)
    return min(finite) if finite else DEFAULT_WINDOW


def _initial(options: AttentionOptions, trained: TokenPattern | None) -> int:
    if options.initial is not None:
        return options.initial
    return DEFAULT_INITIAL if trained is None or not _finite(trained) else trained.initial


def _finite(trained: TokenPattern | None) -> Sequence[int]:
    return () if trained is None else [window for window in trained.windows if window < FOREVER]


def _full_kept(trained: TokenPattern, window: int) -> tuple[int, ...]:
    return tuple(FOREVER if own >= FOREVER else window for own in trained.windows)

"""The caches a user chooses from: SepCache, and its baselines behind the same interface."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from sep_attention import FOREVER

from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.generation.slots import CachePolicy
from sepllm_train.hf.cache import SlotCache
from sepllm_train.hf.hooks import base_of
from sepllm_train.hf.separators import make_pattern, no_separators, trained_pattern


class SepCache(SlotCache):
    """SepLLM's cache of four blocks [initial | separators | past window | local window].

    cache = SepCache(model, initial=4, separators=64, window=256, capacity=800, tokenizer=tokenizer)
    model.generate(**inputs, cache=cache)  # past_key_values=cache before transformers 5.24

    Tokens are appended until there are `capacity` keys. Before the next one the cache drops all but the `initial` first
    tokens of the text, the newest `separators` separators and the last `window` tokens (the one to come included).

    model: a transformers model; or its config, after `attach(model)`. Separators are those of `tokenizer` (among the
    classes `selection`), or `separator_ids`; a model that sepllm export wrote knows its own. full_layers:
    numbers of layers that keep all keys; those the model was trained with unless given. positions, block: see
    SlotCache; the default is `training` where a layer is full, otherwise `cache`.

    Another pattern than that of training is training-free use: it is warned of once, listed in `differences`, and an
    error with strict=True. Raises ValueError when the numbers do not fit together or do not suit the model.
    """

    def __init__(
        self,
        model: Any,
        initial: int = 4,
        separators: int = 64,
        window: int = 256,
        capacity: int = 800,
        *,
        tokenizer: Any = None,
        selection: str = "paper",
        separator_ids: Sequence[int] | None = None,
        positions: str | None = None,
        full_layers: Sequence[int] | None = None,
        strict: bool = False,
        block: int = 1024,
    ) -> None:
        policy = CachePolicy(window, initial, separators, capacity)
        if separators < 1:
            raise ValueError(f"separators={separators} keeps none: use StreamingCache for a cache without separators.")
        model = base_of(model)
        pattern = make_pattern(
            model,
            window=window,
            initial=initial,
            separators=separator_ids,
            tokenizer=tokenizer,
            selection=selection,
        )
        policies = with_full_layers(model, policy, full_layers)
        _start(self, model, policies, pattern, positions, strict, block)


class StreamingCache(SlotCache):
    """StreamingLLM's cache: the `initial` first tokens and the newest ones.

    With `capacity` None the cache always holds the last `window` tokens. With a larger capacity than initial + window
    tokens are dropped many at a time, as SepCache does. The other arguments are SepCache's.
    """

    def __init__(
        self,
        model: Any,
        initial: int = 4,
        window: int = 320,
        capacity: int | None = None,
        *,
        positions: str | None = None,
        full_layers: Sequence[int] | None = None,
        strict: bool = False,
        block: int = 1024,
    ) -> None:
        policy = CachePolicy(window, initial, 0, initial + window if capacity is None else capacity)
        model = base_of(model)
        pattern = no_separators(model, window=window, initial=initial)
        _start(self, model, with_full_layers(model, policy, full_layers), pattern, positions, strict, block)


class FixedCache(SlotCache):
    """SepCache with every `interval`-th token of the text in the place of separators."""

    def __init__(
        self,
        model: Any,
        initial: int = 4,
        separators: int = 64,
        window: int = 256,
        capacity: int = 800,
        *,
        interval: int,
        positions: str | None = None,
        full_layers: Sequence[int] | None = None,
        strict: bool = False,
        block: int = 1024,
    ) -> None:
        if interval < 1:
            raise ValueError(f"interval={interval} must be at least 1.")
        policy = CachePolicy(window, initial, separators, capacity)
        model = base_of(model)
        pattern = no_separators(model, window=window, initial=initial, interval=interval)
        _start(self, model, with_full_layers(model, policy, full_layers), pattern, positions, strict, block)


class PatternCache(SlotCache):
    """The keys that a pattern shows, and no more: those it will not show again are dropped, in pieces.

    pattern: that of training where it is None. Generation is as with the pattern as a mask, in bounded memory but for
    the separators, of which it keeps all within their horizon. Keys keep their positions.
    """

    def __init__(
        self, model: Any, pattern: TokenPattern | None = None, *, strict: bool = False, block: int = 1024
    ) -> None:
        model = base_of(model)
        pattern = pattern or trained_pattern(model.config)
        if pattern is None:
            raise ValueError(
                f"{type(model).__name__} was trained with full attention: give pattern=, made with make_pattern(...)."
            )
        policies = [pattern.policy(layer) for layer in range(len(pattern.windows))]
        _start(self, model, policies, pattern, "training", strict, block)


class FullCache(SlotCache):
    """All keys, counted as the others count theirs."""

    def __init__(self, model: Any, *, positions: str = "training", strict: bool = False, block: int = 1024) -> None:
        model = base_of(model)
        pattern = no_separators(model, window=FOREVER, initial=0)
        policies = [CachePolicy(FOREVER)] * len(pattern.windows)
        _start(self, model, policies, pattern, positions, strict, block)


def with_full_layers(model: Any, policy: CachePolicy, layers: Sequence[int] | None) -> list[CachePolicy]:
    """`policy` for every layer but `layers`, which keep all keys; None stands for the full ones of training.

    Raises ValueError for a layer that is not there.
    """
    count = model.config.get_text_config().num_hidden_layers
    if layers is None:
        trained = trained_pattern(model.config)
        windows = () if trained is None or trained.dense else trained.windows
        layers = [number for number, window in enumerate(windows) if window >= FOREVER]
    wrong = [number for number in layers if not 0 <= number < count]
    if wrong:
        raise ValueError(f"full_layers names layer {wrong[0]}; the model has layers 0 to {count - 1}.")
    return [CachePolicy(FOREVER) if number in layers else policy for number in range(count)]


def differences(trained: TokenPattern | None, used: TokenPattern, policies: Sequence[CachePolicy]) -> tuple[str, ...]:
    """Differences of a cache from the pattern of training, in words. The number of separators it keeps does not count:
    that is its capacity, not its pattern."""
    windows = [policy.window for policy in policies]
    if trained is None or trained.dense:
        return () if all(window >= FOREVER for window in windows) else ("trained with full attention",)
    told = []
    for was, now in zip(trained.windows, windows, strict=True):
        if was != now:
            told.append(f"{_sight(now)} where training had {_sight(was)}")
            break
    if trained.initial != used.initial:
        told.append(f"{used.initial} initial tokens where training had {trained.initial}")
    if trained.interval != used.interval:
        told.append(f"interval {used.interval} where training had {trained.interval}")
    if trained.end_of_document != used.end_of_document:
        told.append("documents that see each other where training had them apart")
    if trained.horizons != used.horizons or trained.separators != used.separators:
        told.append(f"{len(used.separators)} separator tokens where training had {len(trained.separators)}")
    return tuple(told)


def _sight(window: int) -> str:
    return "full attention" if window >= FOREVER else f"a window of {window}"


def _start(
    cache: SlotCache,
    model: Any,
    policies: list[CachePolicy],
    pattern: TokenPattern,
    positions: str | None,
    strict: bool,
    block: int,
) -> None:
    """Initialise one of the caches above, and say where it is not what the model was trained with."""
    if positions is None:
        positions = "cache" if len(set(policies)) == 1 else "training"
    told = differences(trained_pattern(model.config), pattern, policies)
    if told and strict:
        raise ValueError(f"strict=True, and the cache is not what the model was trained with: {'; '.join(told)}.")
    SlotCache.__init__(cache, model, policies, pattern, positions=positions, block=block)
    cache.differences = told
    if told:
        warnings.warn(f"training-free use: {'; '.join(told)}.", stacklevel=3)

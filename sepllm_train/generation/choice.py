"""A cache by name and sizes, as it is chosen on the command line."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sep_attention import FOREVER

from data_prep.tokenizers import Tokenizer
from sepllm_train.config.schema import one_of, require
from sepllm_train.generation.cache import check_positions
from sepllm_train.generation.pattern import TokenPattern, separator_ids
from sepllm_train.generation.slots import CachePolicy

CACHES = ("pattern", "sep", "streaming", "full")
# SepLLM's own sizes, for a model that was trained without a window.
_INITIAL, _SEPARATORS, _WINDOW = 4, 64, 256


@dataclass(frozen=True)
class CacheChoice:
    """cache: `pattern` sees what training showed; `sep` and `streaming` keep keys as SepLLM and StreamingLLM do, with
    and without separators; `full` keeps all. Sizes are tokens, None for what `resolve` takes; positions as in
    NativeCache, None for `cache` where every layer has the same capacity and `training` elsewhere.

    Raises UserError for sizes that the cache does not have.
    """

    cache: str = "pattern"
    initial: int | None = None
    separators: int | None = None
    window: int | None = None
    capacity: int | None = None
    positions: str | None = None

    def __post_init__(self) -> None:
        one_of("--cache", self.cache, CACHES)
        sized = ("initial", "separators", "window", "capacity")
        used = {"sep": sized, "streaming": ("initial", "window", "capacity")}.get(self.cache, ())
        for name in sized:
            require(
                name in used or getattr(self, name) is None,
                f"--{name} {getattr(self, name)} is not a size of --cache {self.cache}: use --cache sep"
                + (" or streaming." if name != "separators" else "."),
            )

    def resolve(self, trained: TokenPattern, tokenizer: Tokenizer) -> ResolvedCache:
        """The cache for a model that was trained with the pattern `trained`.

        Sizes default to the pattern's initial tokens and largest window, 64 separators, and a capacity of twice their
        sum (streaming: their sum). Layers that are full in training stay full, unless all are; a pattern without
        separators takes the tokenizer's. Raises ValueError when the sizes do not fit together or with the positions,
        or there are no separators.
        """
        layers = len(trained.windows)
        if self.cache == "pattern":
            policies = [trained.policy(layer) for layer in range(layers)]
            return self._resolved(trained, policies, "what training showed")
        if self.cache == "full":
            whole = replace(trained, windows=(FOREVER,) * layers, end_of_document=None)
            return self._resolved(whole, [CachePolicy(FOREVER)] * layers, "all keys")
        windows = [window for window in trained.windows if window < FOREVER]
        initial = (trained.initial if windows else _INITIAL) if self.initial is None else self.initial
        window = max(windows, default=_WINDOW) if self.window is None else self.window
        separators = 0
        if self.cache == "sep":
            separators = _SEPARATORS if self.separators is None else self.separators
        size = initial + separators + window
        capacity = self.capacity
        if capacity is None:
            capacity = 2 * size if self.cache == "sep" else size
        policy = CachePolicy(window, initial, separators, capacity)
        pattern = trained
        if self.cache == "sep" and not trained.separators and trained.interval is None:
            pattern = TokenPattern.from_separators(
                separator_ids(tokenizer), len(trained.tier_of_token), layers, window=window, initial=initial
            )
        full = [bool(windows) and window >= FOREVER for window in trained.windows]
        told = f"initial {initial}, separators {separators}, window {window}, capacity {capacity}"
        if any(full):
            told += f", {sum(full)} layers full"
        return self._resolved(pattern, [CachePolicy(FOREVER) if whole else policy for whole in full], told)

    def _resolved(self, pattern: TokenPattern, policies: list[CachePolicy], told: str) -> ResolvedCache:
        bounded = policies[0].capacity is not None and len(set(policies)) == 1
        positions = self.positions or ("cache" if bounded else "training")
        check_positions(positions, policies)
        return ResolvedCache(pattern, policies, positions, f"cache: {self.cache} | {told} | positions {positions}")


@dataclass(frozen=True)
class ResolvedCache:
    """What NativeCache takes, and a line that tells the user."""

    pattern: TokenPattern
    policies: list[CachePolicy]
    positions: str
    line: str

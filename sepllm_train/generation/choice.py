"""A choice of attention or cache by name and numbers, with one set of defaults for all commands.

Imports neither torch nor another large package: command lines are built from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sepllm_train.base.errors import UserError

if TYPE_CHECKING:
    from data_prep.tokenizers import Tokenizer
    from sepllm_train.generation.pattern import TokenPattern
    from sepllm_train.generation.slots import CachePolicy

# Numbers for a model that was trained with full attention: the paper's for training-free use.
INITIAL, WINDOW, SEPARATORS, CLASSES = 3, 256, 64, "paper"
# Places at which keys are compared: in the cache; in the text, up to the model's context; in the text, beyond it.
POSITIONS = ("cache", "training", "absolute")
# Each attention of an evaluation and each cache of a generation or stream, with the settings that apply to it.
ATTENTIONS: dict[str, tuple[str, ...]] = {
    "pattern": ("initial", "window", "classes"),
    "dense": (),
    "streaming": ("initial", "window"),
    "fixed": ("initial", "window", "interval"),
    "cache": ("initial", "window", "classes", "separators", "capacity", "positions"),
}
CACHES: dict[str, tuple[str, ...]] = {
    "pattern": ("positions",),
    "sep": ("initial", "separators", "window", "classes", "capacity", "positions"),
    "streaming": ("initial", "window", "capacity", "positions"),
    "fixed": ("initial", "separators", "window", "capacity", "interval", "positions"),
    "full": ("positions",),
}
SETTINGS = ("initial", "window", "separators", "classes", "capacity", "interval", "positions")
_LEAST = {"initial": 0, "window": 1, "separators": 1, "capacity": 1, "interval": 1}


@dataclass(frozen=True)
class AttentionChoice:
    """An attention of ATTENTIONS or a cache of CACHES by name, with its settings; None stands for the default.

    Attributes:
        name: key of ATTENTIONS or CACHES.
        initial: first tokens that stay visible.
        window: newest tokens that stay visible, the token itself included.
        separators: separators that a cache keeps beyond the window.
        classes: separator classes by name, joined by commas.
        capacity: most keys that a cache holds.
        interval: `fixed` keeps every interval-th token in place of separators.
        positions: one of POSITIONS.
        label: name in results.
    """

    name: str = "pattern"
    initial: int | None = None
    window: int | None = None
    separators: int | None = None
    classes: str | None = None
    capacity: int | None = None
    interval: int | None = None
    positions: str | None = None
    label: str = ""

    def check(self) -> None:
        """Raise UserError for a number that is too small, or `fixed` without an interval."""
        for key, least in _LEAST.items():
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"--{key} {value} must be at least {least}.")
        if self.name == "fixed" and self.interval is None:
            raise UserError("fixed needs --interval D: every D-th token stands for a separator.")

    def settled(self, trained: TokenPattern | None) -> AttentionChoice:
        """The choice with the defaults for a model that was trained with the pattern `trained` (None: full attention).

        Initial tokens and window are those of training - the largest window of its layers - where it had a window,
        else INITIAL and WINDOW. A cache without a capacity gets twice the sum of what it keeps; `streaming` without one
        holds the sum at any time.
        """
        windows = finite_windows(trained)
        initial = INITIAL if trained is None or not windows else trained.initial
        initial = initial if self.initial is None else self.initial
        window = max(windows, default=WINDOW) if self.window is None else self.window
        separators = SEPARATORS if self.separators is None else self.separators
        if self.name == "streaming":
            return replace(self, initial=initial, window=window, separators=0)
        capacity = self.capacity or 2 * (initial + separators + window)
        return replace(self, initial=initial, window=window, separators=separators, capacity=capacity)

    def describe(self) -> dict[str, Any]:
        """Settings that apply to this cache, for results; the keys are part of their format."""
        used = [key for key in CACHES[self.name] if self.name not in ("pattern", "full")]
        values = {key: getattr(self, key) for key in used}
        if "classes" in values:
            values["classes"] = self.classes or CLASSES
        return {"cache": self.name, **values}

    def resolve(self, trained: TokenPattern, tokenizer: Tokenizer) -> ResolvedCache:
        """The cache of a model of ours that was trained with the pattern `trained`.

        Layers that are full in training stay full, unless all are; a pattern without separators takes the tokenizer's.
        Raises ValueError when the numbers do not fit together or with the positions, or there are no separators.
        """
        from sep_attention import FOREVER

        from sepllm_train.generation.slots import CachePolicy

        layers = len(trained.windows)
        if self.name == "pattern":
            policies = [trained.policy(layer) for layer in range(layers)]
            return self._resolved(trained, policies, "as in training")
        if self.name == "full":
            whole = replace(trained, windows=(FOREVER,) * layers, end_of_document=None)
            return self._resolved(whole, [CachePolicy(FOREVER)] * layers, "all keys")
        full = [bool(finite_windows(trained)) and window >= FOREVER for window in trained.windows]
        chosen = self.settled(trained)
        assert chosen.initial is not None and chosen.window is not None and chosen.separators is not None
        capacity = chosen.capacity or chosen.initial + chosen.window
        policy = CachePolicy(chosen.window, chosen.initial, chosen.separators, capacity)
        pattern = chosen._pattern_of(trained, tokenizer)
        line = f"initial {chosen.initial}, separators {chosen.separators}, window {chosen.window}"
        line += f", capacity {capacity}"
        if any(full):
            line += f", {sum(full)} layers full"
        return self._resolved(pattern, [CachePolicy(FOREVER) if whole else policy for whole in full], line)

    def _pattern_of(self, trained: TokenPattern, tokenizer: Tokenizer) -> TokenPattern:
        """The pattern that tells the separators among the tokens, for a choice that is settled.

        `sep` takes those of training, or the tokenizer's where there are none or other classes are chosen.
        """
        import torch
        from sep_attention import FOREVER

        from sepllm_train.generation.pattern import TokenPattern, separator_ids

        if self.name == "fixed":
            nothing = torch.zeros_like(trained.tier_of_token)
            return replace(trained, horizons=(FOREVER,), tier_of_token=nothing, interval=self.interval)
        if self.name != "sep" or (self.classes is None and (trained.separators or trained.interval is not None)):
            return trained
        assert self.window is not None and self.initial is not None
        return TokenPattern.from_separators(
            separator_ids(tokenizer, self.classes or CLASSES),
            len(trained.tier_of_token),
            len(trained.windows),
            window=self.window,
            initial=self.initial,
        )

    def _resolved(self, pattern: TokenPattern, policies: list[CachePolicy], line: str) -> ResolvedCache:
        from sepllm_train.generation.cache import check_positions

        bounded = policies[0].capacity is not None and len(set(policies)) == 1
        positions = self.positions or ("cache" if bounded else "training")
        check_positions(positions, list(dict.fromkeys(policies)))
        return ResolvedCache(pattern, policies, positions, f"cache: {self.name} | {line} | positions {positions}")


@dataclass(frozen=True)
class ResolvedCache:
    """Arguments of NativeCache, and a line that describes them."""

    pattern: TokenPattern
    policies: list[CachePolicy]
    positions: str
    line: str


def finite_windows(trained: TokenPattern | None) -> list[int]:
    """Windows of the layers, ascending, each once, without those of full layers."""
    if trained is None:
        return []
    from sep_attention import FOREVER

    return sorted({window for window in trained.windows if window < FOREVER})


def check_used(choices: Sequence[AttentionChoice], given: Iterable[str], uses: dict[str, tuple[str, ...]]) -> None:
    """Raise UserError for a setting, by its name, that applies to none of the choices; `uses`: ATTENTIONS or CACHES."""
    for key in given:
        if not any(key in uses[choice.name] for choice in choices):
            users = [name for name, keys in uses.items() if key in keys]
            raise UserError(
                f"--{key} does not apply to {', '.join(choice.label or choice.name for choice in choices)}: it is for "
                f"{', '.join(users)}."
            )

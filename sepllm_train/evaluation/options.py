"""What is asked of an attention in an evaluation: its name and numbers, as they are typed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sepllm_train.base.errors import UserError

# The attentions, and what can be said to each.
USES: dict[str, tuple[str, ...]] = {
    "pattern": ("initial", "window", "classes"),
    "dense": (),
    "streaming": ("initial", "window"),
    "fixed": ("initial", "window", "interval"),
    "cache": ("initial", "window", "classes", "separators", "capacity", "positions"),
}
_TEXTS = ("classes", "positions")
# `paper` among the baselines. On GSM8K the paper's FixLLM of interval 5 keeps the share of keys that is nearest to that
# of its nine separators (docs/evaluation.md).
PAPER = "paper"
PAPER_INTERVAL = 5


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
        as here. Several classes are joined by +. Raises UserError."""
        name, *settings = text.split(":")
        if name not in USES:
            raise UserError(
                f"the baseline {name!r} is unknown: choose from {', '.join(USES)}, or {PAPER} for dense, streaming and "
                "fixed (several classes of a baseline are joined by +, not by commas)."
            )
        given: dict[str, Any] = {}
        for setting in settings:
            key, _, value = setting.partition("=")
            if key not in USES[name]:
                raise UserError(
                    f"{setting!r} in the baseline {text} says nothing to {name}, which takes "
                    f"{', '.join(USES[name]) or 'no settings'}."
                )
            if key in _TEXTS and value:
                given[key] = value.replace("+", ",")
            elif key not in _TEXTS and value.isdecimal():
                given[key] = int(value)
            else:
                raise UserError(
                    f"{setting!r} in the baseline {text} is not KEY=VALUE with "
                    f"{'a text' if key in _TEXTS else 'a whole number'}."
                )
        return replace(self, name=name, label=text, **given)


def with_baselines(asked: AttentionOptions, baselines: Sequence[str]) -> list[AttentionOptions]:
    """The attention that is asked for and its baselines. `paper` stands for dense, streaming and fixed, less the one
    that is asked for itself. Raises UserError for a baseline that is not understood."""
    fixed = "fixed" if asked.interval is not None else f"fixed:interval={PAPER_INTERVAL}"
    made = [asked]
    for text in baselines:
        texts = [one for one in ("dense", "streaming", fixed) if one.split(":")[0] != asked.name]
        made += [asked.baseline(one) for one in (texts if text == PAPER else [text])]
    return made


def check_used(attentions: Sequence[AttentionOptions], given: Iterable[str]) -> None:
    """Raise UserError for a setting, by its name, that says nothing to any of the attentions."""
    for key in given:
        if not any(key in USES[one.name] for one in attentions):
            users = [name for name, keys in USES.items() if key in keys]
            raise UserError(
                f"--{key} says nothing to {', '.join(one.label or one.name for one in attentions)}: it is for "
                f"{', '.join(users)}."
            )

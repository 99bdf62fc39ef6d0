"""Shapes of what a JSON or YAML file holds: which keys, of which types.

A shape is a type, a tuple of shapes of which one must fit, `[shape]` for a list, `{str: shape}` for an object with any
keys, or `{"key": shape, "key?": shape}` for one with these keys, of which those with a question mark may be missing;
other keys may be there. A bool is no number, an int is a float, and a Range is a number within bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sepllm_train.base.errors import UserError


@dataclass(frozen=True)
class Range:
    """A finite number of `low` to `high`; a whole one unless `whole` is false."""

    low: float = 0
    high: float = 1 << 62
    whole: bool = True


COUNT = Range()
SECONDS = Range(high=1e15, whole=False)


def require_shape(value: Any, shape: Any, where: str | Path, remedy: str) -> None:
    """Raise UserError, which names the first place that does not fit and ends with `remedy`."""
    fault = misfit(value, shape)
    if fault is not None:
        path, reason = fault
        raise UserError(f"{where}: {path or 'the content'} {reason}: {remedy}.")


def misfit(value: Any, shape: Any, path: str = "") -> tuple[str, str] | None:
    """(dotted path, reason) of the first place where `value` has another shape, None where it fits."""
    if isinstance(shape, tuple):
        faults = [misfit(value, one, path) for one in shape]
        return None if None in faults else faults[0]
    if isinstance(shape, Range):
        return None if _within(value, shape) else (path, f"is {_short(value)}, which is not {_range_words(shape)}")
    if isinstance(shape, list):
        if not isinstance(value, list):
            return path, f"is {_short(value)}, which is no list"
        return _first(misfit(one, shape[0], f"{path}[{number}]") for number, one in enumerate(value))
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return path, f"is {_short(value)}, which is no object"
        if str in shape:
            return _first(misfit(one, shape[str], _join(path, key)) for key, one in value.items())
        return _first(_key(value, key, one, path) for key, one in shape.items())
    known = isinstance(value, shape) and (shape is bool or not isinstance(value, bool))
    return None if known else (path, f"is {_short(value)}, which is no {_WORDS.get(shape, shape.__name__)}")


_WORDS = {dict: "object", list: "list", str: "text", bool: "true or false", type(None): "null"}


def _key(value: dict[str, Any], key: str, shape: Any, path: str) -> tuple[str, str] | None:
    name = key.removesuffix("?")
    if name in value:
        return misfit(value[name], shape, _join(path, name))
    return None if key.endswith("?") else (_join(path, name), "is missing")


def _first(faults: Any) -> tuple[str, str] | None:
    return next((fault for fault in faults if fault is not None), None)


def _within(value: Any, bounds: Range) -> bool:
    number = isinstance(value, int if bounds.whole else int | float) and not isinstance(value, bool)
    return number and bounds.low <= value <= bounds.high and math.isfinite(value)


def _range_words(bounds: Range) -> str:
    kind = "a whole number" if bounds.whole else "a number"
    return f"{kind} from {bounds.low:g} to {bounds.high:g}"


def _join(path: str, key: str) -> str:
    name = key if len(key) <= 80 else f"{key[:80]}..."
    return f"{path}.{name}" if path else name


def _short(value: Any) -> str:
    text = "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."

"""Comparison of two outcomes of a case, value by value: floats by their repr, everything else by equality."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any

_MISSING = object()
# Differences of a case that are printed; the others are counted.
SHOWN = 5


def differences(reference: Any, working: Any) -> list[str]:
    """A line for each value in which two outcomes (JSON) differ, by its path; empty when they are equal."""
    left, right = dict(flatten(reference)), dict(flatten(working))
    return [
        f"{path}: {describe(left.get(path, _MISSING), right.get(path, _MISSING))}"
        for path in left | right
        if not equal(left.get(path, _MISSING), right.get(path, _MISSING))
    ]


def largest(reference: Any, working: Any) -> str | None:
    """The largest relative difference of two numbers at one path, and the path; None where no numbers differ."""
    left, right = dict(flatten(reference)), dict(flatten(working))
    found = [
        (abs(right[path] - value) / max(abs(value), abs(right[path])), path)
        for path, value in left.items()
        if all(isinstance(one, float) and math.isfinite(one) for one in (value, right.get(path)))
        and value != right[path]
    ]
    if not found:
        return None
    ratio, path = max(found)
    return f"largest relative difference of a number: {ratio:.2e}, {path}"


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of nested dicts and lists. An empty one is a leaf itself."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from flatten(inner, f"{path}/{key}" if path else str(key))
    else:
        yield path, value


def equal(one: Any, other: Any) -> bool:
    """Return whether two leaves are the same value of the same type; nan equals nan, and 0.0 is not -0.0."""
    return type(one) is type(other) and repr(one) == repr(other)


def describe(reference: Any, working: Any) -> str:
    """The two values and, for numbers, how far they are apart."""
    if working is _MISSING:
        return "only in the reference"
    if reference is _MISSING:
        return "only in the working tree"
    both = f"{short(reference)} -> {short(working)}"
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (reference, working))
    if not numbers or not (math.isfinite(reference) and math.isfinite(working)) or reference == working:
        return both
    change = working - reference
    parts = [f"{change:+.3g}"]
    if reference:
        parts.append(f"{change / abs(reference):+.2e} relative")
    if isinstance(reference, float) and isinstance(working, float):
        parts.append(f"{ulps(reference, working):,} ulp")
    return f"{both} ({', '.join(parts)})"


def short(value: Any) -> str:
    """A value in a few words; hashes by their first digits."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:16]}..."


def ulps(one: float, other: float) -> int:
    """Number of doubles from one to the other."""
    return abs(_ordinal(one) - _ordinal(other))


def _ordinal(value: float) -> int:
    """Place of a double among all doubles, counted from 0.0."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits if bits >= 0 else -(bits & 0x7FFFFFFFFFFFFFFF)

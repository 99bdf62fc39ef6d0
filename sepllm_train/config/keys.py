"""Keys of a configuration: their descriptions, and checks of their values."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import math
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from sepllm_train.base.errors import UserError

_DESCRIPTION = "description"
_TEXT = "text"
# Whole numbers beyond it are no counts, and floats do not hold them exactly.
LARGEST = 2**53
# Entries of a list.
LONGEST = 10_000


def setting(default: Any, description: str, *, text: bool = False) -> Any:
    """A field of a configuration's dataclass with its default and description.

    text: the entries of a list of anything are text, or have a `path` that is, as they are typed.
    """
    metadata = {_DESCRIPTION: description, _TEXT: text}
    if isinstance(default, list):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Key:
    """A key as it is typed on the command line."""

    name: str
    kind: str
    default: Any
    description: str


def keys_of(kind: type, group: str = "") -> Iterator[Key]:
    """All keys of a configuration, a dataclass, in order; `group`: name before the point."""
    hints = get_type_hints(kind)
    for entry in fields(kind):
        name = f"{group}.{entry.name}" if group else entry.name
        if is_dataclass(hints[entry.name]):
            yield from keys_of(hints[entry.name], name)
            continue
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        yield Key(name, str(entry.type), default, entry.metadata.get(_DESCRIPTION, ""))


def matching(kind: type, pattern: str) -> list[Key]:
    """Keys of a configuration whose name has `pattern` in it, or fits it where it has * or ?."""
    wild = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    return [one for one in keys_of(kind) if fnmatch.fnmatchcase(one.name, wild)]


@dataclass(frozen=True)
class Hint:
    """Type of a key: `kind` is what it holds where it holds anything, `optional` that it may be null, `text` that the
    entries of its list are text."""

    kind: Any
    optional: bool = False
    text: bool = False


def hints_of(kind: type) -> dict[str, Hint]:
    """Types of the keys of a dataclass."""
    hints = get_type_hints(kind)
    return {entry.name: _hint(hints[entry.name], entry.metadata.get(_TEXT, False)) for entry in fields(kind)}


def _hint(hint: Any, text: bool = False) -> Hint:
    arguments = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType) and type(None) in arguments:
        inner = _hint(next(one for one in arguments if one is not type(None)), text)
        return Hint(inner.kind, True, inner.text)
    return Hint(hint, False, text or (get_origin(hint) is list and arguments == (str,)))


def hint_of(kind: type, name: str) -> Hint | None:
    """Type of the key `name` (GROUP.KEY) of a configuration; None where there is no such key."""
    hint = Hint(kind)
    for part in name.split("."):
        if is_dataclass(hint.kind):
            found = hints_of(cast(type, hint.kind)).get(part)
            if found is None:
                return None
            hint = found
        elif get_origin(hint.kind) is dict:
            hint = _hint(get_args(hint.kind)[1])
        else:
            return None
    return hint


def nearest(wanted: str, kind: type) -> str | None:
    """The key of a configuration that is nearest to `wanted`, if one is near, in spelling or in meaning."""
    entries = list(keys_of(kind))
    known = [one.name for one in entries] + [entry.name for entry in fields(kind)]
    group, _, last = wanted.rpartition(".")
    words = last.replace("_", " ").lower()
    alike = difflib.get_close_matches(wanted, known, n=1, cutoff=0.8)
    # A key of another group, and one that is called otherwise.
    alike += [name for name in known if last and name.rpartition(".")[2] == last]
    described = [one.name for one in entries if len(words) > 3 and words in one.description.lower()]
    alike += sorted(described, key=lambda name: not name.startswith(f"{group}."))
    return next(iter(alike or difflib.get_close_matches(wanted, known, n=1)), None)


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def one_of(key: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise UserError unless `value` is one of `choices`."""
    shown = value if str(value).isprintable() else repr(value)
    require(value in choices, f"{key}={shown} is unknown: choose one of {', '.join(choices)}.")


def positive(group: str, values: Any, *keys: str) -> None:
    """Raise UserError unless each named attribute of `values` is at least 1 (None is left to its default)."""
    for key in keys:
        value = getattr(values, key)
        require(value is None or value >= 1, f"{group}.{key}={value} must be at least 1.")


def finite(group: str, values: Any) -> None:
    """Raise UserError for a number that is not finite, a whole number beyond LARGEST, or a list beyond LONGEST."""
    for entry in fields(values):
        value = getattr(values, entry.name)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, float):
                require(math.isfinite(one), f"{group}.{entry.name}={value} must be a finite number.")
            elif isinstance(one, int):
                require(abs(one) <= LARGEST, f"{group}.{entry.name} must be at most 2**53 = {LARGEST}.")
        require(
            not isinstance(value, list) or len(value) <= LONGEST,
            f"{group}.{entry.name} must have at most {LONGEST:,} entries.",
        )


def at_most(group: str, values: Any, **largest: float) -> None:
    """Raise UserError for an attribute above its largest value: more than any machine holds."""
    for key, bound in largest.items():
        value = getattr(values, key)
        require(value is None or value <= bound, f"{group}.{key}={value} must be at most {bound:.0f}.")


def number_or_share(value: Any) -> bool:
    """True for a whole number of at least 1, or a number between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value >= 1 if isinstance(value, int) else 0 < value < 1

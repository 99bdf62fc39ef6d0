"""Keys of a configuration: their descriptions, and checks of their values."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from sepllm_train.base.errors import UserError

_DESCRIPTION = "description"


def setting(default: Any, description: str) -> Any:
    """A field of a configuration's dataclass with its default and description."""
    metadata = {_DESCRIPTION: description}
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


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def one_of(key: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise UserError unless `value` is one of `choices`."""
    require(value in choices, f"{key}={value} is unknown: choose one of {', '.join(choices)}.")


def positive(group: str, values: Any, *keys: str) -> None:
    """Raise UserError unless each named attribute of `values` is at least 1 (None is left to its default)."""
    for key in keys:
        value = getattr(values, key)
        require(value is None or value >= 1, f"{group}.{key}={value} must be at least 1.")


def finite(group: str, values: Any) -> None:
    """Raise UserError for an attribute that is infinite or not a number."""
    for entry in fields(values):
        value = getattr(values, entry.name)
        require(
            not isinstance(value, float) or math.isfinite(value),
            f"{group}.{entry.name}={value} must be a finite number.",
        )


def number_or_share(value: Any) -> bool:
    """True for a whole number of at least 1, or a number between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value >= 1 if isinstance(value, int) else 0 < value < 1

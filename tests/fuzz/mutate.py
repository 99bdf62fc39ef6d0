"""Changes of bytes and of JSON values, drawn from a random generator."""

from __future__ import annotations

import copy
import random
from typing import Any

# What readers are not made for: other types, borders of integer types, other text.
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1,
    -(2**31), -(2**63), 0.5, -1.5, 1e308, 1e-320, "", " ", "a", "0", "1e9", "\0", "\n", "\ud800", "\ufeff", "</s>",
    "../x", "x" * 3000, [], {}, [[]], [{}], {"": None}, [None], [0, 0], ["a", "a"], {"type": "Sequence"}, {"type": 0},
)  # fmt: skip
_ODD_BYTES = (b"", b"\0" * 8, b"\xff" * 8, b"\x7f" + b"\xff" * 7, (2**31).to_bytes(8, "little"), b"\xff\xff\xff\x7f")


def mutate_bytes(rng: random.Random, content: bytes, changes: int = 4) -> bytes:
    """`content` with up to `changes` pieces overwritten, inserted, removed, repeated or swapped, or cut short."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, changes)):
        place = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 1, 2, 4, 8, rng.randint(1, 64)))
        how = rng.randrange(7)
        if how == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif how == 1:
            changed[place : place + length] = rng.randbytes(length)
        elif how == 2:
            odd = rng.choice(_ODD_BYTES)
            changed[place : place + len(odd)] = odd
        elif how == 3:
            changed[place:place] = rng.randbytes(length)
        elif how == 4:
            del changed[place : place + length]
        elif how == 5:
            changed[place:place] = changed[place : place + length] * rng.choice((1, 2, 50))
        elif rng.random() < 0.3:
            del changed[place:]
    return bytes(changed)


def mutate_json(rng: random.Random, value: Any, changes: int = 3) -> Any:
    """A copy of a JSON value with up to `changes` values replaced, removed, added, repeated or moved."""
    changed = copy.deepcopy(value)
    for _ in range(rng.randint(1, changes)):
        holder, key = _place(rng, changed)
        if holder is None:
            continue
        how = rng.randrange(6)
        if how <= 2:
            holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif how == 3:
            del holder[key]
        elif how == 4 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(rng.choice((holder[key], *ODD_VALUES))))
        elif how == 4:
            holder[rng.choice(("", "more", "type", key + "s"))] = copy.deepcopy(rng.choice(ODD_VALUES))
        else:
            other, place = _place(rng, changed)
            if other is not None:
                holder[key] = copy.deepcopy(other[place])
    return changed


def _place(rng: random.Random, value: Any) -> tuple[Any, Any]:
    """A container in a JSON value and a key of it: near the root as often as deep inside."""
    holder = key = None
    while isinstance(value, dict | list) and value:
        holder, key = value, rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value = value[key]
        if rng.random() < 0.3:
            break
    return holder, key

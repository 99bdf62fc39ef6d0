"""Choosing separator classes by what the data holds: the strongest boundaries that a budget of density has room for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from data_prep.separators import CLASSES, SPLIT_OFF, class_numbers
from data_prep.sidecar import SidecarHeader

STRENGTHS: dict[str, tuple[str, ...]] = {
    "paragraph": ("paragraph_merged", "paragraph_mixed"),
    "line": ("newline", "line_merged", "line_mixed"),
    "sentence": (
        "period", "question", "exclamation", "sentence_merged", "sentence_mixed", "fullwidth_sentence",
        "other_sentence",
    ),
    "clause": (
        "semicolon", "colon", "comma", "clause_merged", "comma_mixed", "colon_mixed", "fullwidth_clause",
        "other_clause",
    ),
    "space": ("tab", "space", "space_run"),
}  # fmt: skip
"""Kinds of boundaries from the strongest to the weakest, with the classes that mark them."""

# Shares are summed in whole parts of a million.
_PARTS = 1_000_000
TOLERANCE = 1e-4
"""How far rounding to whole parts may put a sum of shares outside the budget, with room to spare."""


@dataclass(frozen=True)
class Selection:
    """Chosen classes: `numbers` ascending, and `density`, the fraction of the tokens that they have together."""

    numbers: tuple[int, ...]
    density: float


def densities(headers: Sequence[SidecarHeader], weights: Sequence[float]) -> dict[int, float]:
    """Fraction of the tokens that each class has in a blend: number -> fraction, `weights` summing to 1.

    Where a side-car was made before a class was split off another, the two count as the older one.
    """
    shares: dict[int, float] = {}
    for header, weight in zip(headers, weights, strict=True):
        for entry in header.classes:
            shares[entry.number] = shares.get(entry.number, 0.0) + weight * entry.density
    for number, older in missing_splits(headers).items():
        shares[older] = shares.get(older, 0.0) + shares.pop(number, 0.0)
    return shares


def missing_splits(headers: Sequence[SidecarHeader]) -> dict[int, int]:
    """The classes of SPLIT_OFF that a header does not know, each with the older class that holds its tokens."""
    known = [{entry.number for entry in header.classes} for header in headers]
    return {number: older for number, older in SPLIT_OFF.items() if not all(number in numbers for numbers in known)}


def select(shares: Mapping[int, float], least: float, most: float) -> Selection:
    """The strongest classes whose shares of the tokens, `shares`, sum to a density within [least, most].

    Classes are taken in the order of STRENGTHS, within a strength the rarer first: the stronger mark (; before ,).
    Each is taken if it keeps the sum under `most` and the rest can still bring it to `least`. Where no choice of
    classes lies in the budget, each is taken that keeps the sum under `most`. Classes that do not occur are left out.
    """
    ranked = [number for number in _ranked(shares) if 0 < shares[number] <= most]
    parts = [round(shares[number] * _PARTS) for number in ranked]
    upper = round(most * _PARTS)
    taken = _first_within(parts, round(least * _PARTS), upper)
    if taken is None:
        taken = _first_within(parts, 0, upper) or []
    numbers = tuple(sorted(ranked[place] for place in taken))
    return Selection(numbers, sum(shares[number] for number in numbers))


def _ranked(shares: Mapping[int, float]) -> list[int]:
    """Class numbers from the strongest to the weakest."""
    rank = {number: level for level, names in enumerate(STRENGTHS.values()) for number in class_numbers(names)}
    return sorted(shares, key=lambda number: (rank[number], shares[number], number))


def _first_within(values: list[int], least: int, most: int) -> list[int] | None:
    """Places of the values that are taken, earlier ones first, so that their sum lies in [least, most]; None where no
    choice does."""

    @cache  # totals that led nowhere are met again and again
    def rest(place: int, total: int) -> tuple[int, ...] | None:
        if total + sum(values[place:]) < least:
            return None
        if place == len(values):
            return ()
        if total + values[place] <= most:
            later = rest(place + 1, total + values[place])
            if later is not None:
                return (place, *later)
        return rest(place + 1, total)

    taken = rest(0, 0)
    return None if taken is None else list(taken)


def class_names(numbers: Collection[int], split: Mapping[int, int]) -> list[str]:
    """Names of classes as configurations have them; `split` are the missing splits of the data (see above)."""
    sets = dict.fromkeys(split.values(), "clause_mixed")
    return [sets.get(entry.number, entry.name) for entry in CLASSES if entry.number in numbers]

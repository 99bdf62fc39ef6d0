"""The fixed classes of separators, and the class of each vocabulary entry.

Every token has one u8 class, decided once from the entry's own string; 0 is "not a separator". Numbers are stable:
files on disk hold them, so a class may be added but never renumbered.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sepllm_train.base.errors import UserError

MAX_CLASSES = 32


@dataclass(frozen=True)
class SeparatorClass:
    """One class: its stable number (1..31), the short name typed in configurations, and what it holds."""

    number: int
    name: str
    description: str


CLASSES: tuple[SeparatorClass, ...] = (
    SeparatorClass(1, "period", "exactly '.'"),
    SeparatorClass(2, "comma", "exactly ','"),
    SeparatorClass(3, "question", "exactly '?'"),
    SeparatorClass(4, "exclamation", "exactly '!'"),
    SeparatorClass(5, "semicolon", "exactly ';'"),
    SeparatorClass(6, "colon", "exactly ':'"),
    SeparatorClass(7, "space", "exactly one space"),
    SeparatorClass(8, "tab", "exactly one tab"),
    SeparatorClass(9, "newline", "exactly one newline"),
    SeparatorClass(10, "clause_merged", "marks and whitespace only; the strongest is , ; or :"),
    SeparatorClass(11, "sentence_merged", "marks and whitespace only; the strongest is . ? or !"),
    SeparatorClass(12, "line_merged", "marks and whitespace only, with one line break"),
    SeparatorClass(13, "paragraph_merged", "marks and whitespace only, with two line breaks or more"),
    SeparatorClass(14, "space_run", "other or several spaces and tabs"),
    SeparatorClass(15, "comma_mixed", "a comma or semicolon with other symbols, such as ),"),
    SeparatorClass(16, "sentence_mixed", 'a sentence mark with other symbols, such as ."'),
    SeparatorClass(17, "line_mixed", "one line break with other symbols"),
    SeparatorClass(18, "paragraph_mixed", "two line breaks or more with other symbols"),
    SeparatorClass(19, "fullwidth_clause", "fullwidth and CJK clause marks, alone or with symbols"),
    SeparatorClass(20, "fullwidth_sentence", "fullwidth and CJK sentence marks, alone or with symbols"),
    SeparatorClass(21, "other_clause", "clause marks of other scripts, alone or with symbols"),
    SeparatorClass(22, "other_sentence", "sentence marks of other scripts and the ellipsis character"),
    SeparatorClass(23, "colon_mixed", 'colons with other symbols, such as ":'),
)

PAPER: tuple[int, ...] = tuple(range(1, 10))
"""The nine exact single-character strings of arXiv 2412.12094."""

ALL: tuple[int, ...] = tuple(entry.number for entry in CLASSES)

NAMED_SETS: dict[str, tuple[int, ...]] = {"paper": PAPER, "all": ALL, "clause_mixed": (15, 23)}

SPLIT_OFF: dict[int, int] = {23: 15}
"""Classes that were part of an older one: side-cars without them in their header count their tokens as the older."""

EARLIER_NAMES: dict[int, tuple[str, ...]] = {15: ("clause_mixed",)}
"""Names that classes had when older side-cars were written."""

_NUMBER = {entry.name: entry.number for entry in CLASSES}
_EXACT = {string: number for number, string in enumerate(".,?!;: \t\n", start=1)}
_CLAUSE = frozenset(",;:")
_COMMA = frozenset(",;")
_SENTENCE = frozenset(".?!")
_FULLWIDTH_CLAUSE = frozenset("\uff0c\uff1b\uff1a\u3001\uff64\ufe50\ufe51\ufe54\ufe55\ufe10\ufe11\ufe13\ufe14")
_FULLWIDTH_SENTENCE = frozenset("\u3002\uff01\uff1f\uff0e\uff61\ufe52\ufe56\ufe57\ufe12\ufe15\ufe16")
_OTHER_CLAUSE = frozenset("\u060c\u061b\u0387\u055d\u1363\u1364\u1365\u1366")
_OTHER_SENTENCE = frozenset("\u2026\u061f\u06d4\u0964\u0965\u0589\u1362\u1367\u17d4\u203c\u2047\u2048\u2049")
# One break for "\r\n"; U+2029 is by itself a paragraph's end.
_LINE_BREAK = re.compile("\r\n|[\n\r\v\f\x85\u2028]")
_PARAGRAPH = "\u2029"
_BREAKS = frozenset("\n\r\v\f\x85\u2028\u2029")


def classify(token_bytes: Sequence[bytes | None]) -> NDArray[np.uint8]:
    """Class of each vocabulary entry from its byte string, u8 [V]; None and incomplete UTF-8 give 0.

    A mixed entry (no letter, digit or combining mark, but at least one mark or line break) takes its strongest:
    paragraph > line > sentence > clause. Spaces beside other symbols, such as " (", separate nothing.
    """
    return np.array([_class_of(entry) for entry in token_bytes], dtype=np.uint8)


def _class_of(entry: bytes | None) -> int:
    try:
        text = (entry or b"").decode("utf8")
    except UnicodeDecodeError:
        return 0
    if text in _EXACT:
        return _EXACT[text]
    if not text or any(unicodedata.category(character)[0] in "LNM" for character in text):
        return 0
    characters = frozenset(text)
    suffix = "merged" if all(character in _EXACT or _is_blank(character) for character in characters) else "mixed"
    breaks = len(_LINE_BREAK.findall(text))
    if breaks >= 2 or _PARAGRAPH in characters:
        return _NUMBER[f"paragraph_{suffix}"]
    if breaks:
        return _NUMBER[f"line_{suffix}"]
    mark = _sentence_or_clause(characters, suffix)
    return mark if mark or suffix == "mixed" else _NUMBER["space_run"]


def _sentence_or_clause(characters: frozenset[str], suffix: str) -> int:
    ranked = (
        (_SENTENCE, f"sentence_{suffix}"),
        (_FULLWIDTH_SENTENCE, "fullwidth_sentence"),
        (_OTHER_SENTENCE, "other_sentence"),
        (_CLAUSE, _clause(characters, suffix)),
        (_FULLWIDTH_CLAUSE, "fullwidth_clause"),
        (_OTHER_CLAUSE, "other_clause"),
    )
    return next((_NUMBER[name] for marks, name in ranked if marks & characters), 0)


def _clause(characters: frozenset[str], suffix: str) -> str:
    """Name of the class of clause marks: a colon with other symbols, as in JSON, binds tighter than a comma does."""
    if suffix == "merged":
        return "clause_merged"
    return "comma_mixed" if characters & _COMMA else "colon_mixed"


def _is_blank(character: str) -> bool:
    return character in " \t" or character in _BREAKS or unicodedata.category(character) == "Zs"


def as_known(classes: NDArray[np.uint8], known: Collection[int]) -> NDArray[np.uint8]:
    """The classes as a side-car counts them that knows the numbers `known` only: see SPLIT_OFF."""
    table = np.arange(256, dtype=np.uint8)
    for number, older in SPLIT_OFF.items():
        if number not in known:
            table[number] = older
    return table[classes]


def class_numbers(selection: str | Iterable[str]) -> tuple[int, ...]:
    """Sorted class numbers of a selection: names of classes and of NAMED_SETS, also a comma-separated mixture.

    Raises UserError that lists the known names when one is unknown.
    """
    names = selection.split(",") if isinstance(selection, str) else selection
    chosen: set[int] = set()
    for name in (part.strip() for part in names):
        if name in NAMED_SETS:
            chosen.update(NAMED_SETS[name])
        elif name in _NUMBER:
            chosen.add(_NUMBER[name])
        else:
            known = ", ".join([*NAMED_SETS, *_NUMBER])
            raise UserError(f"Unknown separator class {name!r}: choose among {known}.")
    return tuple(sorted(chosen))

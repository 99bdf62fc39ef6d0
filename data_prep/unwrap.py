"""Joining the hard-wrapped lines of books, whose line breaks would otherwise be counted as separators."""

from __future__ import annotations

from itertools import pairwise

_WIDEST_WRAP = 120
_SLACK = 0.9


def unwrap_lines(text: str) -> str:
    """Join lines that were broken only because the next word did not fit.

    The wrap width is the 90th percentile of the text's line lengths; above 120 characters the text is taken as not
    wrapped and returned as it is. A line joins the one before it when its first word would not have fitted there
    (within 10% of the width), so verse, headings and the last lines of paragraphs stay, and so do blank and indented
    lines. A line that ends in a single hyphen is joined without a space ("well-" and "known").
    """
    lines = text.replace("\r\n", "\n").split("\n")
    lengths = sorted(len(line.rstrip()) for line in lines if line.strip())
    width = lengths[int(0.9 * (len(lengths) - 1))] if lengths else 0
    if width > _WIDEST_WRAP:
        return text
    parts = [lines[0]]
    for before, line in pairwise(lines):
        if not _was_wrapped(before, line, width):
            parts += ["\n", line]
            continue
        parts[-1] = parts[-1].rstrip()
        compound = parts[-1].endswith("-") and not parts[-1].endswith("--")
        parts += [line] if compound else [" ", line]
    return "".join(parts)


def _was_wrapped(before: str, line: str, width: int) -> bool:
    if not before.strip() or not line.strip() or line[0].isspace():
        return False
    first_word = line.split(maxsplit=1)[0]
    return len(before.rstrip()) + 1 + len(first_word) > _SLACK * width

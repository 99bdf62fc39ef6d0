"""Lines on the terminal: printing on rank 0, folding, and numbers as text."""

from __future__ import annotations

import os
import sys
import textwrap

# Characters of a console line.
WIDTH = 120


def say(text: str) -> None:
    """Print on rank 0, at once."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def note(text: str) -> None:
    """Print on rank 0's stderr what is no part of a program's result."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as 45s, 3m10s, 2h05m or 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def quantity(value: float) -> str:
    """A count with a metric suffix: 1234567 -> 1.23M."""
    for threshold, suffix in (
        (1e24, "Y"),
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= threshold:
            return f"{value / threshold:.3g}{suffix}"
    return f"{value:.3g}"


def flop_count(value: float) -> str:
    """A number of floating-point operations: 1.4e8 -> 140 MFLOP. Work, not a rate: no plural that reads like one."""
    figure = quantity(value)
    digits = figure.rstrip("kMGTPEZY")
    return f"{digits} {figure[len(digits) :]}FLOP"


def fold(text: str, width: int = WIDTH) -> str:
    """`text` in lines of at most `width` characters, all but the first one indented.

    Broken before a ` | `; between words only where a part is too long for a line of its own. Long words, such as paths,
    stay whole.
    """
    lines: list[str] = []
    for number, part in enumerate(text.split(" | ")):
        joined = f"{lines[-1]} | {part}" if lines else part
        if len(joined) <= width:
            lines[-1:] = [joined]
            continue
        indents = ("  | ", "    ") if number else ("", "  ")
        lines += textwrap.wrap(
            part,
            width,
            initial_indent=indents[0],
            subsequent_indent=indents[1],
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)

"""What the user reads on the terminal."""

from __future__ import annotations

import os
import sys


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

"""Reading the README and docs/: commands of fenced blocks, tables, code spans, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


class Command(NamedTuple):
    """A command of a `bash` block or table: the page it is on and its words as a shell would split them."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def commands() -> list[Command]:
    """Every command of the `bash` blocks and of the cells of tables, once for each page, comments left out."""
    found: dict[Command, None] = {}
    for page in PAGES:
        lines = []
        for language, body in _FENCE.findall(page.read_text(encoding="utf8")):
            lines += body.replace("\\\n", " ").splitlines() if language == "bash" else []
        rows = [line for line in prose(page).splitlines() if line.startswith("| ")]
        lines += [span for row in rows for span in _SPAN.findall(row) if span.startswith(("python ", "torchrun "))]
        for line in lines:
            if words := shlex.split(line, comments=True):
                found[Command(page.name, tuple(words))] = None
    return list(found)


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf8"))


def spans(page: Path) -> list[str]:
    """Contents of the code spans outside of fenced blocks."""
    return _SPAN.findall(prose(page))


def links(page: Path) -> list[str]:
    """Targets of links and images."""
    return _LINK.findall(prose(page))


def table(page: str, heading: str) -> list[list[str]]:
    """Cells of the body rows of the table of `page` whose header row starts with `heading`; fails without one."""
    lines = (REPOSITORY / page).read_text(encoding="utf8").splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith(f"| {heading} |")), None)
    assert start is not None, f"{page} has no table that starts with {heading!r}"
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows

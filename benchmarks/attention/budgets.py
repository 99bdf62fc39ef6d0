"""Recorded spills of the compile gate, by Triton's minor version: registers move from one version to the next.

The file maps each version to the bytes that a thread of a kernel may spill, {"3.7": {}, "3.8": {"forward ...": 24}};
kernels that are not listed may spill none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import read_json, write_json
from sepllm_train.base.errors import UserError

Spills = Mapping[str, int]


class Budget(NamedTuple):
    """Recorded spills in bytes of a thread, by name of the compilation, and the minor version they are of."""

    version: str
    spills: Spills


def minor_version(version: str) -> str:
    """The first two numbers of a version: "3.7" for "3.7.1" and for "3.7.0+git1a2b"."""
    return ".".join(version.split(".")[:2])


def read_budget(path: Path, version: str) -> Budget:
    """Load the budget for a version of Triton, or the nearest one that is recorded.

    The nearest is the newest of those before `version`, and the oldest of all where none is before it. Without a file
    the budget is empty. Raises UserError for a file in another form.
    """
    wanted = minor_version(version)
    recorded = _recorded(path)
    if not recorded or wanted in recorded:
        return Budget(wanted, recorded.get(wanted, {}))
    before = [known for known in recorded if _order(known) < _order(wanted)]
    nearest = max(before, key=_order) if before else min(recorded, key=_order)
    return Budget(nearest, recorded[nearest])


def record_budget(path: Path, version: str, spills: Spills) -> None:
    """Write the spills of a version, leaving those of the other versions as they are."""
    recorded = _recorded(path) | {minor_version(version): spills}
    write_json(path, {known: recorded[known] for known in sorted(recorded, key=_order)})


def _recorded(path: Path) -> dict[str, Spills]:
    if not path.is_file():
        return {}
    content: Any = read_json(path)
    if not isinstance(content, dict) or not all(re.fullmatch(r"\d+\.\d+", version) for version in content):
        raise UserError(f"{path} does not list budgets by Triton version: delete it and run with --record.")
    return content


def _order(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))

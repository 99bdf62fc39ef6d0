"""`make test` and `make test-slow` together run every test, and continuous integration runs both."""

from __future__ import annotations

import re
from pathlib import Path


def test_the_two_selections_are_complements(repository: Path) -> None:
    makefile = (repository / "Makefile").read_text()
    chosen = dict(
        re.findall(r"^(test[\w-]*):.*\n\t\$\(PYTEST\) \$\(PYTEST_ARGS\) -m '([\w ]+)'", makefile, re.MULTILINE)
    )
    assert chosen == {"test": "not slow", "test-slow": "slow"}
    # Nothing but the marker selects: no path or name is left out in the configuration.
    assert re.search(r"^test-all: test test-slow", makefile, re.MULTILINE)
    assert not re.search(
        r"--(ignore|deselect)|norecursedirs|collect_ignore", (repository / "pyproject.toml").read_text()
    )
    lines = (repository / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make ")] == ["make test", "make test-slow"]

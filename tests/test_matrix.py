"""scripts/matrix.py: what it skips, that it resumes, and that the page holds the recorded results."""

from __future__ import annotations

import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def matrix(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    import matrix

    return matrix


def test_no_interpreter(matrix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for tool in ("sh", "sed", "dirname", "git"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", "/nowhere")
    assert matrix.main(["--only", "newest", "--folder", str(tmp_path / "matrix")]) == 0
    assert "newest: skipped: there is no Python 3.13 here" in capsys.readouterr().out


def interpreter_is_found(matrix: Any, monkeypatch: pytest.MonkeyPatch, pip: str = "exit 0") -> None:
    """find_python.sh finds a program that makes an environment of one file, whose pip ends as is said."""

    def run(command: list[str], **options: Any) -> Any:
        if command[0] == "sh":
            return real([sys.executable, "-c", "print('python3.13')"], **options)
        if "venv" in command:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.write_text(f"#!/bin/sh\n{pip}\n")
            python.chmod(0o755)
            return SimpleNamespace(returncode=0)
        return real(command, **options)

    real = matrix.subprocess.run
    monkeypatch.setattr(matrix.subprocess, "run", run)


def test_short_disk(matrix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    interpreter_is_found(matrix, monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 3 * 10**9))
    assert matrix.main(["--only", "newest", "--smoke", "--folder", str(tmp_path)]) == 0
    assert "newest: skipped: it needs about 8 GB, and 3.0 GB are free." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pip", "words"),
    [
        (
            "echo 'ERROR: No matching distribution found for torch==2.11.0' >&2; exit 1",
            "packages are not available: No",
        ),
        ("exec sleep 20", "the installation was not done after 1s"),
    ],
)
def test_packages_that_cannot_be_had(
    matrix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, pip: str, words: str
) -> None:
    interpreter_is_found(matrix, monkeypatch, pip)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 10**11))
    assert matrix.main(["--only", "oldest", "--limit", "1", "--folder", str(tmp_path)]) == 0
    assert f"oldest: skipped: {words}" in capsys.readouterr().out
    assert not (tmp_path / "oldest").exists()


def test_what_passed_is_not_run_again(matrix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(combination: Any, *_: object) -> dict[str, Any]:
        ran.append(combination.name)
        outcome = "failed" if combination.name == "shipped" else "passed"
        return {"outcome": outcome, "commit": matrix.commit(), "what": "fast tests", "seconds": 1}

    monkeypatch.setattr(matrix, "run", run)
    monkeypatch.setattr(matrix, "commit", lambda: "0123456")
    for _ in range(2):
        assert matrix.main(["--only", "shipped", "--only", "newest", "--folder", str(tmp_path)]) == 1
    assert ran == ["shipped", "newest", "shipped"]
    # A changed tree is another one each time.
    monkeypatch.setattr(matrix, "commit", lambda: "0123456-dirty")
    ran.clear()
    for _ in range(2):
        assert matrix.main(["--only", "newest", "--folder", str(tmp_path)]) == 0
    assert ran == ["newest", "newest"]


def test_the_page_holds_the_recorded_results(matrix: Any) -> None:
    page = matrix.PAGE.read_text(encoding="utf8")
    assert matrix.REGION.search(page) and matrix.render(page, matrix._read(matrix.RESULTS)) == page


def test_the_fast_half_is_that_of_make_test(matrix: Any, repository: Path) -> None:
    makefile = (repository / "Makefile").read_text()
    arguments, marker = " ".join(matrix.FAST).split(" -m ")
    assert f"PYTEST_ARGS ?= {arguments}\n" in makefile and f"$(PYTEST_ARGS) -m '{marker}'" in makefile

"""A few inputs of every target; `python -m tests.fuzz --inputs 100000` runs many."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.fuzz import runner
from tests.fuzz.runner import all_targets, fuzz


@pytest.mark.parametrize("target", sorted(all_targets()))
def test_a_few_inputs(target: str, tmp_path: Path) -> None:
    """Here in this process, where an exception shows its traceback."""
    for number in range(60):
        all_targets()[target](random.Random(f"0 {target} {number}"), tmp_path)
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


def test_what_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exceptions, crashes, hangs and memory are, and the inputs after them still run."""

    def target(rng: random.Random, folder: Path) -> None:
        number = int((folder / "number").read_text()) if (folder / "number").exists() else None
        assert number is None, "an input's files are gone before the next one"
        (folder / "number").write_text("1")
        count.append(1)
        if len(count) == 2:
            raise KeyError("key")
        if len(count) == 4:
            bytearray(2 << 30)
        if len(count) == 6:
            while True:
                pass

    count: list[int] = []
    monkeypatch.setattr(runner, "all_targets", lambda: {"one": target})
    monkeypatch.setattr(runner, "MOST_SECONDS", 0.5)
    found = list(fuzz("one", range(8)))
    assert [finding.number for finding in found] == [1, 3, 5]
    assert "KeyError: 'key'" in found[0].what and "MiB" in found[1].what and "Hang" in found[2].what


def test_a_crash_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def target(rng: random.Random, folder: Path) -> None:
        if rng.random() < 0.5:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(runner, "all_targets", lambda: {"one": target})
    expected = [number for number in range(9) if random.Random(f"0 one {number}").random() < 0.5]
    found = list(fuzz("one", range(9)))
    assert expected and [finding.number for finding in found] == expected
    assert all("ended with code -9" in finding.what for finding in found)

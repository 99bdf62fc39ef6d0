"""Folders and globs of input files, and how files are shared out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.inputs import find_inputs, parts_of
from sepllm_train.base.errors import UserError


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """A folder of several kinds of files."""
    folder = tmp_path / "books"
    for name in (
        "b.txt",
        "a.jsonl.zst",
        "Z.txt",
        "part/c.parquet",
        ".hidden.txt",
        ".cache/d.txt",
        "README.md",
        "e.csv",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def test_a_folder(books: Path) -> None:
    messages: list[str] = []
    files = find_inputs(["x.txt", books], messages.append)
    assert files == [Path("x.txt"), *(books / name for name in ("Z.txt", "a.jsonl.zst", "b.txt", "part/c.parquet"))]
    assert messages == [
        f"{books}: left out .cache/d.txt, .hidden.txt, README.md, e.csv (hidden, or neither .txt, .jsonl nor .parquet)",
        f"{books}: 4 files in the order of their paths, {books}/Z.txt to {books}/part/c.parquet",
    ]


def test_a_glob(books: Path) -> None:
    assert find_inputs([f"{books}/*.txt"]) == [books / "Z.txt", books / "b.txt"]
    assert find_inputs([f"{books}/**/*.parquet"]) == [books / "part" / "c.parquet"]
    (books / "odd[1].txt").touch()  # a name, though it could be a pattern
    assert find_inputs([books / "odd[1].txt"]) == [books / "odd[1].txt"]


@pytest.mark.parametrize("name", ["part/*.txt", ".cache", "none"])
def test_a_folder_or_glob_without_files(books: Path, name: str) -> None:
    (books / "none").mkdir()
    if name == ".cache":  # what is hidden may be named; then its files count
        assert find_inputs([books / name]) == [books / ".cache" / "d.txt"]
        return
    with pytest.raises(UserError, match=r"There is no \.txt, \.jsonl or \.parquet file in .*hidden files do not count"):
        find_inputs([books / name])


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=8), count=st.integers(1, 20))
def test_every_byte_is_in_one_share(sizes: list[int], count: int) -> None:
    """In order, and every file, also one without bytes, has one share that begins it."""
    if count > max(sum(sizes), 1):
        with pytest.raises(UserError, match="cannot be shared"):
            parts_of(sizes, 1, count)
        return
    shares = [parts_of(sizes, number, count) for number in range(1, count + 1)]
    assert all(shares)
    parts = [part for share in shares for part in share]
    reached = dict.fromkeys(range(len(sizes)), 0)
    for file, low, high in parts:
        assert low == reached[file] and (high is None or low < high < sizes[file])
        reached[file] = sizes[file] if high is None else high
    assert list(reached.values()) == sizes
    assert [part.file for part in parts if part.low == 0 and part.high != 0] == list(range(len(sizes)))
    assert sum(part.high is None for part in parts) == len(sizes)


def test_cuts_move_to_the_edges_of_files() -> None:
    """Files of nearly one size are dealt out whole."""
    sizes = [1000, 1050, 980, 970]
    assert [[part.file for part in parts_of(sizes, number, 4)] for number in (1, 2, 3, 4)] == [[0], [1], [2], [3]]
    assert parts_of([1000], 2, 4)[0] == (0, 250, 500)

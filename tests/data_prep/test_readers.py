"""Documents from files: formats, damage, text that is not UTF-8, unwrapping."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data_prep.readers import Corpus, unwrap_lines
from sepllm_train.base.errors import UserError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def _read(path: Path, **options: object) -> list[str]:
    return [document.text for document in Corpus([path], **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_formats_and_concatenated_streams(tmp_path: Path, texts: list[str], suffix: str) -> None:
    lines = [json.dumps({"text": text, "id": 1}).encode() + b"\n" for text in texts]
    jsonl = tmp_path / f"a.jsonl{suffix}"
    compress = COMPRESS[suffix]
    jsonl.write_bytes(compress(b"".join(lines[:7])) + compress(b"\n") + compress(b"".join(lines[7:])))
    assert _read(jsonl) == texts
    text = tmp_path / f"a.txt{suffix}"
    text.write_bytes(compress("\n".join(texts).encode()))
    assert _read(text) == ["\n".join(texts)]


def test_positions_reach_the_size_of_the_input(tmp_path: Path, texts: list[str]) -> None:
    paths = [tmp_path / "a.jsonl.gz", tmp_path / "b.txt"]
    paths[0].write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    paths[1].write_text(texts[0], encoding="utf8")
    corpus = Corpus(paths)
    positions = [document.position for document in corpus]
    assert positions == sorted(positions)
    assert positions[-1] == corpus.size


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_compression(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    content = COMPRESS[suffix](b'{"text": "' + bytes(range(35, 91)) * 999 + b'"}\n')
    path.write_bytes(content[:-9] if damage == "cut" else b"garbage" + content)
    with pytest.raises(UserError, match=rf"a\.jsonl{suffix} is damaged or cut short"):
        _read(path)


def test_documents_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n{"text": "\\ud800"}\n{"text": ""}\n{"text": "two"}\n')
    messages: list[str] = []
    corpus = Corpus([path], report=messages.append)
    assert [document.text for document in corpus] == ["one", "two"]
    assert (corpus.skipped, corpus.empty) == (2, 1)
    assert messages == [f"skipped {path}:2: not UTF-8 (byte 10)", f"skipped {path}:3: not UTF-8 (byte 0)"]
    with pytest.raises(UserError, match=r"a\.jsonl:2 is not UTF-8 \(byte 10\)"):
        _read(path, strict=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', r"a\.jsonl:2 has no text field 'text' \(it has 'body'\): name it with --field"),
        ('{"text": 3}', r"a\.jsonl:2 has no text field 'text'"),
        ('["text"]', r"a\.jsonl:2 has no text field 'text' \(it is no object\)"),
        ('{"text": "x"', r"a\.jsonl:2 is not JSON"),
    ],
)
def test_lines_without_text(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        _read(tmp_path / "a.jsonl")


def test_inputs_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").touch()
    with pytest.raises(UserError, match=r"a\.csv\.gz is neither \.txt nor \.jsonl"):
        Corpus([tmp_path / "a.csv.gz"])
    with pytest.raises(UserError, match=r"There is no file .*b\.txt"):
        Corpus([tmp_path / "b.txt"])


BOOK = """CHAPTER I

It was a bright cold day in April, and the clocks were striking
thirteen, which nobody in the street had expected, least of all a well-
known watchmaker on his way home.
  "Indented speech starts a new paragraph here, and it goes on until
it is wrapped too."

    Verse keeps its lines,
    Though they are short.

Unindented verse
Is kept as well,
"""


def test_unwrapping_a_book() -> None:
    unwrapped = unwrap_lines(BOOK)
    assert "striking thirteen, which" in unwrapped
    assert "a well-known watchmaker on his way home.\n  " in unwrapped
    assert "goes on until it is wrapped too." in unwrapped
    assert "    Verse keeps its lines,\n    Though they are short.\n\nUnindented verse\nIs kept as well,\n" in unwrapped
    assert unwrapped.split() == BOOK.replace("well-\nknown", "well-known").split()


def test_text_that_is_not_wrapped_stays(texts: list[str]) -> None:
    long_lines = "\n".join(text.replace("\n", " ") for text in texts)
    assert unwrap_lines(long_lines) == long_lines
    assert unwrap_lines("") == ""
    assert unwrap_lines("\n\n") == "\n\n"

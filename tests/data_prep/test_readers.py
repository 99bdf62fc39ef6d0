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

from data_prep import readers
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


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("chunk", [7, 1 << 18])
def test_zeros_between_and_after_streams(
    tmp_path: Path, texts: list[str], suffix: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stream padding of .xz, and what tapes and block devices leave behind a .gz."""
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    path = tmp_path / f"a.jsonl{suffix}"
    compress = COMPRESS[suffix]
    path.write_bytes(compress(b"".join(lines[:7])) + bytes(8) + compress(b"".join(lines[7:])) + bytes(512))
    assert _read(path) == texts


def test_legal_zstd_streams(tmp_path: Path) -> None:
    """A window beyond the 128 MiB that zstd takes by itself (`zstd --ultra --long=31`), and frames to skip."""
    path = tmp_path / "a.jsonl.zst"
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    line = b'{"text": "a long window"}\n'
    wide = stream.compress(line) + stream.flush()
    assert zstandard.get_frame_parameters(wide).window_size == 1 << 28
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    path.write_bytes(skipped + wide + skipped + COMPRESS[".zst"](line) + skipped)
    assert _read(path) == ["a long window"] * 2


def test_byte_order_marks(tmp_path: Path) -> None:
    """At the start of a file, and where files were joined; a mark inside a text stays."""
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"one")
    assert _read(tmp_path / "a.txt") == ["one"]
    (tmp_path / "a.jsonl").write_bytes(
        mark + b'{"text": "one"}\r\n \r\n' + mark + b'{"text": "t\xef\xbb\xbfwo"}\n' + mark
    )
    assert _read(tmp_path / "a.jsonl") == ["one", "t\ufeffwo"]
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(mark))
    assert _read(tmp_path / "b.txt.gz") == []


def test_a_document_whose_text_is_null(tmp_path: Path) -> None:
    """It is a document without text: named, counted and left out, or an error when strict."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": null}\n{"text": ""}\n{"text": "two"}\n')
    messages: list[str] = []
    corpus = Corpus([path], report=messages.append)
    assert [document.text for document in corpus] == ["one", "two"]
    assert (corpus.skipped, corpus.empty) == (0, 2)
    assert messages == [f"skipped {path}:2: its text is null"]
    with pytest.raises(UserError, match=r"a\.jsonl:2 has null for its text field 'text': fill it, or leave --strict"):
        _read(path, strict=True)


def test_fields_beside_the_text_are_not_read(tmp_path: Path) -> None:
    """Numbers of any size, NaN, and objects deeper than other readers take."""
    path = tmp_path / "a.jsonl"
    deep = "[" * 200 + "]" * 200
    path.write_text(f'{{"id": {"9" * 5000}, "score": NaN, "weight": 1e999, "tree": {deep}, "text": "one"}}\n')
    assert _read(path) == ["one"]
    path.write_text(f'{{"tree": {"[" * 100_000}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1 is not JSON \(nested too deeply\)"):
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
        ('{"text": 3}', r"a\.jsonl:2 has a number for its text field 'text': name another with --field"),
        ('{"text": ["x"]}', r"a\.jsonl:2 has a list for its text field 'text': name another with --field"),
        ('{"text": {"a": 1}}', r"a\.jsonl:2 has an object for its text field 'text'"),
        ('{"text": true}', r"a\.jsonl:2 has true or false for its text field 'text'"),
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

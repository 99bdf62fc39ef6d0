"""Columns of .parquet files: types, nulls, row groups, missing columns, damage."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import parquet
from data_prep.parquet import TextColumn
from data_prep.readers import Corpus
from sepllm_train.base.errors import UserError
from tests.support.command import command

main = command("prepare")

STRINGS = [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(),
    pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.string()),
]  # fmt: skip


def _write(path: Path, column: Any, name: str = "text", **options: Any) -> Path:
    pq.write_table(pa.table({"id": range(len(column)), name: column}), path, **options)
    return path


def _read(path: Path, **options: Any) -> list[str]:
    return [document.text for document in Corpus([path], **options)]


@pytest.mark.parametrize("type_", STRINGS, ids=str)
def test_types_of_text(tmp_path: Path, texts: list[str], type_: Any) -> None:
    many = [text + "\u20ac" for text in texts] * 2
    column = (
        pa.array(many).cast(type_.value_type).dictionary_encode().cast(type_)
        if (pa.types.is_dictionary(type_))
        else pa.array(many, pa.string() if "string" in str(type_) else type_).cast(type_)
    )
    path = _write(tmp_path / "a.parquet", column, row_group_size=11)
    assert pq.read_schema(path).field("text").type == type_
    assert _read(path) == many


@pytest.mark.parametrize("rows", [1, 2, 1024])
def test_rows_come_in_order_through_groups_and_batches(
    tmp_path: Path, texts: list[str], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_BATCH_ROWS", rows)
    path = _write(tmp_path / "a.parquet", texts, row_group_size=7, compression="zstd")
    with TextColumn(path, "text") as column:
        assert column.rows == len(texts)
        for first, end in ((0, 40), (0, 1), (6, 8), (7, 14), (13, 39), (39, 40), (20, 20)):
            found = [data.decode() for data, _ in column.texts(first, end) if data is not None]
            assert found == texts[first:end]
    corpus = Corpus([path, path])
    positions = [document.position for document in corpus]
    assert positions == sorted(positions) and positions[-1] == corpus.size == 2 * path.stat().st_size


def test_batches_are_bounded_by_their_bytes(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds the memory: long documents come few at a time."""
    path = _write(tmp_path / "a.parquet", texts, use_dictionary=False, compression="none")
    mean = sum(len(text.encode()) for text in texts) / len(texts)
    sizes = []
    monkeypatch.setattr(parquet, "_BATCH_BYTES", round(5.5 * mean))
    iter_batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, size, **more: sizes.append(size) or iter_batches(self, size, **more),
    )
    assert _read(path) == texts
    assert sizes == [5]


def test_nested_columns(tmp_path: Path) -> None:
    """A field of a structure, also where the structure itself is null."""
    rows = [{"text": "one", "meta": {"id": 1}}, None, {"text": None, "meta": None}, {"text": "two", "meta": {"id": 2}}]
    path = _write(tmp_path / "a.parquet", pa.array(rows), name="doc")
    messages: list[str] = []
    corpus = Corpus([path], "doc.text", report=messages.append)
    assert [(document.text, document.source) for document in corpus] == [("one", f"{path}:1"), ("two", f"{path}:4")]
    assert corpus.empty == 2 and messages == [f"skipped {path}:{row}: its text is null" for row in (2, 3)]
    with pytest.raises(
        UserError, match=r"no column 'text' \(did you mean 'doc.text'\? it has 'id', 'doc.text', 'doc.me"
    ):
        _read(path)
    _write(tmp_path / "b.parquet", ["a dot in a name"], name="doc.text")
    assert _read(tmp_path / "b.parquet", text_field="doc.text") == ["a dot in a name"]


def test_rows_without_text_are_those_of_jsonl(tmp_path: Path) -> None:
    texts = ["one", None, "", "two"]
    path = _write(tmp_path / "a.parquet", pa.array(texts))
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for each in (path, lines):
        messages: list[str] = []
        corpus = Corpus([each], report=messages.append)
        assert [document.text for document in corpus] == ["one", "two"]
        assert (corpus.skipped, corpus.empty) == (0, 2) and messages == [f"skipped {each}:2: its text is null"]
        with pytest.raises(UserError, match=r":2 has null for its text field 'text': fill it, or leave --strict"):
            _read(each, strict=True)
    assert _read(_write(tmp_path / "b.parquet", pa.nulls(3))) == []


@pytest.mark.parametrize("type_", [pa.binary(), pa.string()], ids=str)
def test_rows_that_are_not_utf8(tmp_path: Path, type_: Any) -> None:
    """pyarrow writes and reads such strings without a word."""
    column = pa.array([b"one", b"caf\xe9", b"two"], pa.binary()).view(type_)
    path = _write(tmp_path / "a.parquet", column)
    messages: list[str] = []
    corpus = Corpus([path], report=messages.append)
    assert [document.text for document in corpus] == ["one", "two"]
    assert corpus.skipped == 1 and messages == [f"skipped {path}:2: not UTF-8 (byte 3)"]


def test_labels_beside_the_text(tmp_path: Path) -> None:
    table = pa.table({"text": ["one", "two"], "source": pa.array(["web", None]).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    corpus = Corpus([tmp_path / "a.parquet"], label_field="source")
    assert [(document.text, document.label) for document in corpus] == [("one", "web"), ("two", None)]
    corpus = Corpus([tmp_path / "a.parquet"], label_field="origin")
    assert [document.label for document in corpus] == [None, None]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("txt", r"has no column 'txt' \(did you mean 'text'\? it has 'id', 'text', 'words'\): name it with --field"),
        ("body", r"has no column 'body' \(it has 'id', 'text', 'words'\): name it with --field"),
        ("id", r"has int64 for its text column 'id' \(it has .*\): name another with --field"),
        ("words", r"has list<element: string> for its text column 'words'"),
    ],
)
def test_columns_without_text(
    tmp_path: Path, small_tokenizer: Path, field: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written, in whatever place of the inputs."""
    table = pa.table({"id": [1], "text": ["one"], "words": [["one"]]})
    pq.write_table(table, tmp_path / "b.parquet")
    _write(tmp_path / "a.parquet", ["fine"], name=field)
    with pytest.raises(UserError, match=rf"b\.parquet {message}"):
        Corpus([tmp_path / "a.parquet", tmp_path / "b.parquet"], field)
    words = ["tokenize", tmp_path / "a.parquet", tmp_path / "b.parquet", "--field", field]
    assert main([*words, "--tokenizer", small_tokenizer, "--output", tmp_path / "new" / "set"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "new").exists()


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has more than one column for its text column 'text'"):
        Corpus([tmp_path / "a.parquet"])


def damaged(content: bytes) -> Sequence[bytes]:
    """Cut short, of another kind, and with pages that were changed."""
    middle = len(content) // 4
    changed = content[:middle] + bytes(byte ^ 255 for byte in content[middle : middle + 64]) + content[middle + 64 :]
    return content[:-20], content[:50], b"", b"garbage" * 99, content[:-9] + b"\xff" + content[-8:], changed


@pytest.mark.parametrize("number", range(6))
def test_damaged_files(tmp_path: Path, texts: list[str], number: int) -> None:
    path = _write(tmp_path / "a.parquet", texts, use_dictionary=False, compression="zstd", write_page_checksum=True)
    path.write_bytes(damaged(path.read_bytes())[number])
    with pytest.raises(UserError, match=r"a\.parquet is damaged or cut short \(.+\): copy it again\.$"):
        _read(path)


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_tokenizer: Path) -> None:
    """Other files need none of it."""
    path = _write(tmp_path / "a.parquet", ["one"])
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert _read(tmp_path / "a.txt") == ["one"]
    with pytest.raises(UserError, match=r"a\.parquet needs pyarrow \(.*\): pip install -e '.\[parquet\]' in the check"):
        Corpus([path])

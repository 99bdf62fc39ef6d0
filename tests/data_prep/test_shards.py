"""Shards of a dataset: their merge is what one process writes, each task looks at its own documents, mistakes."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep import readers, shards
from data_prep.readers import Corpus
from data_prep.shards import merge, read_shard, shard_prefix, tokenize_shard
from data_prep.tokenize import tokenize_files
from data_prep.train_tokenizer import train_tokenizer
from sepllm_train.base.errors import UserError
from tests.support.command import command
from tests.support.waiting import HANG_SECONDS, wait_until

main = command("prepare")


def _jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def _plain(folder: Path, texts: list[str]) -> list[Path]:
    (folder / "a.jsonl").write_bytes(_jsonl(texts))
    return [folder / "a.jsonl"]


def _packed(content: bytes) -> bytes:
    """Streams of 1,000 bytes each, which end inside of lines: each gives what it holds when it is read."""
    compress = zstandard.ZstdCompressor().compress
    return b"".join(compress(content[start : start + 1000]) for start in range(0, len(content), 1000))


def _compressed(folder: Path, texts: list[str]) -> list[Path]:
    (folder / "a.jsonl.zst").write_bytes(_packed(_jsonl(texts)))
    return [folder / "a.jsonl.zst"]


def _books(folder: Path, texts: list[str]) -> list[Path]:
    paths = [folder / f"{number:02}.txt" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf8")
    return paths


def _parquet(folder: Path, texts: list[str]) -> list[Path]:
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), folder / "a.parquet", row_group_size=9)
    return [folder / "a.parquet"]


def _mixed(folder: Path, texts: list[str]) -> list[Path]:
    """A folder of all kinds, with files of no document."""
    for number, make in enumerate((_plain, _compressed, _parquet, _books)):
        inner = folder / "set" / str(number)
        inner.mkdir(parents=True)
        make(inner, texts[number * 10 : number * 10 + 10])
    (folder / "set" / "0" / "0.jsonl").touch()
    (folder / "set" / "1" / "z.jsonl").write_text("\n\n")
    (folder / "set" / "9.txt").touch()
    _parquet(folder / "set", [])
    return [folder / "set"]


KINDS = {"jsonl": _plain, "zst": _compressed, "txt": _books, "parquet": _parquet, "folder": _mixed}


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def two(tmp_path: Path, corpus: Path, small_tokenizer: Path) -> Path:
    """Prefix of a dataset whose two shards are finished and not merged."""
    for number in (1, 2):
        tokenize_shard([corpus], tmp_path / "out" / "set", small_tokenizer, (number, 2), progress=False)
    return tmp_path / "out" / "set"


@pytest.mark.parametrize("kind", KINDS)
def test_the_merge_is_what_one_process_writes(
    kind: str, tmp_path: Path, texts: list[str], small_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that a small compressed file is more than one read long.
    monkeypatch.setattr(readers, "_CHUNK", 512)
    monkeypatch.setattr(shards, "_CHUNK", 1000)
    inputs = KINDS[kind](tmp_path, texts)
    tokenize_files(inputs, tmp_path / "one" / "set", small_tokenizer, progress=False)
    whole = _hashes(tmp_path / "one")
    for count in (1, 2, 7):
        parts = tmp_path / f"parts{count}" / "set"
        found = []
        for number in range(count, 0, -1):
            header, written = tokenize_shard(inputs, parts, small_tokenizer, (number, count), progress=False)
            assert written and header == read_shard(shard_prefix(parts, number, count))
            found.append(header.documents)
        # Work is shared by bytes on the disk, which hold less text in some files of the folder than in others.
        assert sum(found) == len(texts)
        assert kind == "folder" or max(found) <= 1.34 * len(texts) / count + 1
        merge(tmp_path / str(count) / "set", [shard_prefix(parts, n + 1, count) for n in range(count)], progress=False)
        assert _hashes(tmp_path / str(count)) == whole


def test_more_shards_than_documents(tmp_path: Path, small_tokenizer: Path) -> None:
    """Shards without a document; one that begins and ends inside of a long line; no more shards than bytes."""
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.txt", tmp_path / "c.txt"]
    inputs[0].write_text(json.dumps({"text": "some words " * 30}) + "\n" + json.dumps({"text": "end"}))
    inputs[1].write_text("a book")
    inputs[2].touch()
    tokenize_files(inputs, tmp_path / "one" / "set", small_tokenizer, progress=False)
    for number in range(1, 41):
        tokenize_shard(inputs, tmp_path / "parts" / "set", small_tokenizer, (number, 40), progress=False)
    merge(tmp_path / "parts" / "set", progress=False)
    for suffix in (".bin", ".idx", ".sep.bin", ".sep.json"):
        assert Path(f"{tmp_path}/parts/set{suffix}").read_bytes() == Path(f"{tmp_path}/one/set{suffix}").read_bytes()
    with pytest.raises(UserError, match="bytes of input cannot be shared by 1,000 shards: take fewer"):
        Corpus(inputs, share=(1, 1000))


@pytest.mark.parametrize("make", [_plain, _compressed], ids=["jsonl", "zst"])
def test_a_task_looks_at_its_own_documents(
    make: Callable[..., list[Path]], tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_CHUNK", 512)
    inputs = make(tmp_path, texts)
    content = _jsonl([*texts[:3], "broken", *texts[3:]]).replace(b'"text": "broken"', b'"text": oops')
    inputs[0].write_bytes(content if inputs[0].suffix == ".jsonl" else _packed(content))
    read = [document.text for number in (2, 3, 4) for document in Corpus(inputs, share=(number, 4))]
    assert len(read) >= 20 and read == texts[-len(read) :]
    with pytest.raises(UserError, match=r"a\.jsonl(\.zst)?:4 is not JSON"):
        list(Corpus(inputs, share=(1, 4)))


def test_every_cut_of_a_file(tmp_path: Path) -> None:
    """Also between two lines: as many shares as bytes."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(_jsonl(["one", "two", "three"]) + b"\n" + _jsonl(["four"]))
    count = path.stat().st_size
    corpora = [Corpus([path], share=(number, count)) for number in range(1, count + 1)]
    assert [document.text for corpus in corpora for document in corpus] == ["one", "two", "three", "four"]
    assert all(before.end == after.begin for before, after in pairwise(corpora))


def test_a_line_far_inside_a_file_is_named_by_its_byte(tmp_path: Path, texts: list[str]) -> None:
    """Its number would take reading all that is before it."""
    content = _jsonl(texts)
    (tmp_path / "a.jsonl").write_bytes(content + b'{"text": oops}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl at byte {len(content)} is not JSON"):
        list(Corpus([tmp_path / "a.jsonl"], share=(2, 2)))


def test_a_killed_shard_is_made_again(
    tmp_path: Path, texts: list[str], small_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the same command, which leaves a finished one as it is."""
    inputs = [tmp_path / "large.jsonl"]
    inputs[0].write_bytes(_jsonl(["".join(texts)] * 60))
    prefix = tmp_path / "out" / "set"
    words = ["tokenize", str(inputs[0]), "--output", str(prefix), "--tokenizer", str(small_tokenizer), "--workers", "1"]
    started = [sys.executable, "-m", "sepllm_train", "prepare", *words, "--shard", "2/2"]
    process = subprocess.Popen(started)
    partial = Path(f"{shard_prefix(prefix, 2, 2)}.bin.partial")
    wait_until(lambda: partial.exists() and partial.stat().st_size > 0, "the first tokens", process)
    process.send_signal(signal.SIGKILL)
    process.wait(HANG_SECONDS)
    # Killed a moment later, its files would have had their names already.
    shard_prefix(prefix, 2, 2).with_name("set.shard-2-of-2.bin").write_bytes(b"of before")
    assert main([*words, "--shard", "1/2"]) == 0
    finished = _hashes(prefix.parent)
    assert main(["merge", str(prefix)]) == 2
    assert "1 of 2 shards are missing or unfinished (2): make them with `sepllm prepare tokenize --shard 2/2`" in (
        capsys.readouterr().err
    )
    assert not Path(f"{prefix}.bin").exists()
    for number in (1, 2):
        assert main([*words, "--shard", f"{number}/2"]) == 0
    assert f"{prefix}.shard-1-of-2 was finished before and is left as it is" in capsys.readouterr().out
    assert finished.items() - _hashes(prefix.parent).items() <= {
        item for item in finished.items() if "shard-2" in item[0]
    }
    assert main(["merge", str(prefix)]) == 0
    assert "2 shards were merged and can be removed" in capsys.readouterr().out
    assert main([*words[:2], "--output", str(tmp_path / "one" / "set"), *words[4:]]) == 0
    assert _hashes(tmp_path / "one").items() <= _hashes(prefix.parent).items()


def test_a_merged_dataset_is_not_overwritten(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(two)]) == 0
    before = _hashes(two.parent)
    capsys.readouterr()
    assert main(["merge", f"{two}.bin"]) == 2
    assert capsys.readouterr().err == f"error: {two}.bin exists already: choose another name or pass --overwrite.\n"
    assert main(["merge", str(two), "--overwrite"]) == 0
    assert _hashes(two.parent) == before


def test_shards_that_do_not_belong_together(
    two: Path, corpus: Path, small_tokenizer: Path, texts: list[str], tmp_path: Path
) -> None:
    """One sentence each, and nothing is written."""
    first, second = (shard_prefix(two, number, 2) for number in (1, 2))
    train_tokenizer(texts, tmp_path / "other.model", vocab_size=500)
    other = tmp_path / "other.jsonl"
    other.write_bytes(corpus.read_bytes() + b"\n")
    body = tmp_path / corpus.name
    body.write_bytes(corpus.read_bytes().replace(b'"text"', b'"body"'))
    odd: dict[str, tuple[Any, ...]] = {
        "list of input files": ([other], small_tokenizer, (2, 2), {}),
        "tokenizer": ([corpus], tmp_path / "other.model", (2, 2), {}),
        "--unwrap": ([corpus], small_tokenizer, (2, 2), {"unwrap": True}),
        "--field": ([body], small_tokenizer, (2, 2), {"text_field": "body"}),
        "number of shards": ([corpus], small_tokenizer, (2, 3), {}),
    }
    for number, (difference, (inputs, tokenizer, shard, options)) in enumerate(odd.items()):
        place = tmp_path / str(number) / "set"
        tokenize_shard(inputs, place, tokenizer, shard, progress=False, **options)
        with pytest.raises(UserError, match=f"was made with another {difference} than .*: name those that go together"):
            merge(tmp_path / "new", [first, shard_prefix(place, *shard)], progress=False)
        if shard == (2, 2):
            with pytest.raises(UserError, match=f"exists already and was made with another {difference}: pass --over"):
                tokenize_shard(inputs, two, tokenizer, shard, progress=False, **options)
    with pytest.raises(UserError, match="are both shard 1: name one of them"):
        merge(tmp_path / "new", [first, second, first], progress=False)
    with pytest.raises(UserError, match=r"1 of 2 shards are missing or unfinished \(1\)"):
        merge(tmp_path / "new", [second], progress=False)
    with pytest.raises(UserError, match=r"There is no finished shard new\.shard-\*-of-\* in "):
        merge(tmp_path / "new", progress=False)
    with pytest.raises(UserError, match=r"new\.shard\.json is missing: .*new is no finished shard"):
        merge(tmp_path / "new", [tmp_path / "new"], progress=False)
    assert not list(tmp_path.glob("new*"))


def test_damaged_shards(two: Path, tmp_path: Path) -> None:
    prefix = shard_prefix(two, 2, 2)

    def refused(suffix: str, content: bytes, message: str) -> None:
        path = Path(f"{prefix}{suffix}")
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            merge(tmp_path / "new", [shard_prefix(two, 1, 2), prefix], progress=False)
        path.write_bytes(before)

    for suffix in (".bin", ".idx"):
        content = Path(f"{prefix}{suffix}").read_bytes()
        changed = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        refused(suffix, changed, rf"set\.shard-2-of-2\{suffix} was changed after it was written")
        refused(suffix, content[:-2], rf"set\.shard-2-of-2\{suffix} has [\d,]+ bytes where its header says")
    header = json.loads(Path(f"{prefix}.shard.json").read_text())
    for key, value, message in (
        ("version", 2, "has version 2, this program reads 1"),
        ("shard", 3, r"is damaged \(shard is 3, not a whole number from 1 to 2\)"),
        ("tokens", header["tokens"] + 1, "counts its tokens or documents wrongly"),
        ("begin", [0, header["begin"][1] + 1], "does not end in the input where .*shard-2-of-2 begins"),
        ("end", [0, 5], "do not hold all of the input"),
        ("end", 5, r"is damaged \(end is 5, not a file and a place in it\)"),
    ):
        refused(".shard.json", json.dumps({**header, key: value}).encode(), message)
    first = Path(f"{shard_prefix(two, 1, 2)}.tokenizer.model")
    first.write_bytes(first.read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"shard-1-of-2\.tokenizer\.model"):
        merge(tmp_path / "new", [shard_prefix(two, 1, 2), prefix], progress=False)
    assert not list(tmp_path.glob("new*"))


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/2/3", "-1/2", "a/b"])
def test_shards_are_numbered_from_one(shard: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["tokenize", "a.txt", "--tokenizer", "t", "--output", "o", f"--shard={shard}"])
    assert stop.value.code == 2
    assert f"{shard} is not I/N with I from 1 to N, as 3/16" in capsys.readouterr().err

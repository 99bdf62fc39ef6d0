"""The pipeline: what it writes, that it does not depend on the threads, that nothing is half written."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_prep import tokenize
from data_prep.readers import Document
from data_prep.separators import classify
from data_prep.sidecar import open_classes, read_header
from data_prep.tokenize import tokenize_documents, tokenize_files
from data_prep.tokenizers import load_tokenizer
from data_prep.writer import DatasetWriter
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import PartialFile
from tests.support.waiting import HANG_SECONDS, wait_until

FINAL = {"set.bin", "set.idx", "set.sep.bin", "set.sep.json", "set.tokenizer.model"}


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_megatron_core_reads_the_documents(dataset: Path, texts: list[str], small_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(small_tokenizer)
    indexed = IndexedDataset(str(dataset))
    assert indexed.document_indices.tolist() == list(range(len(texts) + 1))
    assert indexed.index.dtype == np.uint16
    classes = open_classes(dataset)
    table = classify(tokenizer.token_bytes())
    start = 0
    for number, text in enumerate(texts):
        tokens = indexed[number]
        assert tokens[-1] == tokenizer.eod
        assert tokenizer.decode(tokens[:-1].tolist()) == text
        assert np.array_equal(indexed.get(number, offset=2, length=5), tokens[2:7])
        assert np.array_equal(classes[start : start + len(tokens)], table[tokens])
        start += len(tokens)
    assert start == len(classes)


def test_the_header_describes_the_data(dataset: Path, texts: list[str], small_tokenizer: Path) -> None:
    header = read_header(dataset)
    tokens = np.fromfile(f"{dataset}.bin", dtype=np.uint16)
    assert (header.tokens, header.documents) == (len(tokens), len(texts))
    assert header.bytes == sum(len(text.encode("utf8")) for text in texts)
    assert np.array(header.token_bytes)[tokens].sum() == header.bytes
    assert header.tokenizer.sha256 == hashlib.sha256(small_tokenizer.read_bytes()).hexdigest()
    assert (dataset.parent / header.tokenizer.file).read_bytes() == small_tokenizer.read_bytes()
    for entry in header.classes:
        assert entry.count == np.isin(tokens, entry.ids).sum()
        assert entry.density == entry.count / len(tokens)
    for suffix, info in header.files.items():
        assert info.sha256 == hashlib.sha256(Path(f"{dataset}{suffix}").read_bytes()).hexdigest()
    assert {path.name for path in dataset.parent.iterdir()} == FINAL


def test_output_does_not_depend_on_the_workers(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [shared_data / "misc" / "tinyshakespeare.txt"]
    tokenizer = shared_data / "tokenizers" / "20B_tokenizer.json"
    for workers in (1, 2):
        tokenize_files(inputs, tmp_path / str(workers) / "set", tokenizer, workers=workers, progress=False)
    monkeypatch.setattr(tokenize, "_BATCH_CHARACTERS", 1000)
    tokenize_files(inputs, tmp_path / "small" / "set", tokenizer, workers=3, progress=False)
    assert _hashes(tmp_path / "1") == _hashes(tmp_path / "2") == _hashes(tmp_path / "small")
    tokens = np.fromfile(tmp_path / "1" / "set.bin", dtype=np.uint16)
    text = inputs[0].read_text(encoding="utf8")
    loaded = load_tokenizer(tokenizer)
    assert tokens.tolist() == [*loaded.encode_batch([text])[0], loaded.eod]


def test_existing_output_is_kept(dataset: Path, corpus: Path, small_tokenizer: Path) -> None:
    before = _hashes(dataset.parent)
    with pytest.raises(UserError, match=r"set\.bin exists already: choose another name or pass --overwrite"):
        tokenize_files([corpus], dataset, small_tokenizer)
    assert _hashes(dataset.parent) == before
    tokenize_files([corpus], dataset, small_tokenizer, overwrite=True)
    assert _hashes(dataset.parent) == before


def test_a_failing_run_leaves_nothing(tmp_path: Path, small_tokenizer: Path, corpus: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(corpus.read_text() + "oops\n")
    with pytest.raises(UserError, match=r"bad\.jsonl:\d+ is not JSON"):
        tokenize_files([tmp_path / "bad.jsonl"], tmp_path / "out" / "set", small_tokenizer)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_empty_corpus_is_refused(tmp_path: Path, small_tokenizer: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('\n{"text": ""}\n')
    with pytest.raises(UserError, match="The corpus is empty: no document with text"):
        tokenize_files([tmp_path / "empty.jsonl"], tmp_path / "out" / "set", small_tokenizer)
    assert list((tmp_path / "out").iterdir()) == []


def test_documents_are_read_only_as_far_ahead_as_needed(
    tmp_path: Path, small_tokenizer: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What bounds the memory: batches wait to be written before more documents are read."""
    monkeypatch.setattr(tokenize, "_BATCH_CHARACTERS", 1)
    written = 0

    def documents():  # type: ignore[no-untyped-def]
        for number in range(60):
            assert number - written <= 2 * tokenize._BATCHES_PER_WORKER
            yield Document(texts[number % len(texts)], "", number)

    def count(position: int) -> None:
        nonlocal written
        written += 1

    with DatasetWriter(tmp_path / "set", load_tokenizer(small_tokenizer)) as writer:
        tokenize_documents(documents(), writer, workers=2, on_batch=count)
        assert writer.finish().documents == written == 60


def test_two_writers_of_one_dataset(tmp_path: Path, small_tokenizer: Path, corpus: Path) -> None:
    with (
        PartialFile(tmp_path / "set.bin"),
        pytest.raises(UserError, match=r"set\.bin is being written by another process"),
    ):
        tokenize_files([corpus], tmp_path / "set", small_tokenizer)


@pytest.mark.parametrize(("end", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_stopped_run_leaves_nothing_that_looks_finished(
    tmp_path: Path, small_tokenizer: Path, corpus: Path, texts: list[str], end: signal.Signals, code: int
) -> None:
    (tmp_path / "large.jsonl").write_text((json.dumps({"text": "".join(texts)}) + "\n") * 300)
    prefix = tmp_path / "out" / "set"
    command = [sys.executable, "-m", "sepllm_train", "prepare", "tokenize", str(tmp_path / "large.jsonl")]
    process = subprocess.Popen(
        [*command, "--output", str(prefix), "--tokenizer", str(small_tokenizer), "--workers", "1"]
    )
    partial = Path(f"{prefix}.bin.partial")
    wait_until(lambda: partial.exists() and partial.stat().st_size > 0, "the first tokens", process)
    process.send_signal(end)
    assert process.wait(HANG_SECONDS) == code
    left = {path.name for path in prefix.parent.iterdir()}
    assert not left & FINAL
    assert (partial.name in left) == (end is signal.SIGKILL)
    tokenize_files([corpus], prefix, small_tokenizer)
    assert {path.name for path in prefix.parent.iterdir()} == FINAL
    assert read_header(prefix).documents == len(texts)

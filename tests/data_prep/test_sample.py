"""The sample corpus: made once, whole, the same for everybody with this Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import sample
from data_prep.sample import prepare_sample, sample_documents
from data_prep.sidecar import read_header
from data_prep.tokenizers import load_tokenizer
from data_prep.verify import verify
from sepllm_train.base.errors import UserError
from tests.support.waiting import HANG_SECONDS


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    code = f"from data_prep.sample import prepare_sample; print(prepare_sample({str(tmp_path)!r}, vocab_size=1024))"
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=HANG_SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    messages = [message for _, message in outputs if message]
    assert len(messages) == 1 and messages[0].startswith("Preparing the sample corpus (docs of Python 3.")
    prefix = prepare_sample(tmp_path, vocab_size=1024)
    assert outputs[0][0].strip() == str(prefix)
    header = verify(prefix)
    assert header.tokenizer.vocab_size == 1024
    assert header.documents > 1000 and header.bytes > 1_500_000
    assert {path.suffix for path in tmp_path.iterdir() if path != prefix.parent} == {".lock"}


def test_documents_are_distinct_and_shuffled() -> None:
    documents = [document.text for document in sample_documents()]
    assert len(set(documents)) == len(documents)
    modules = dict(sample._library_modules())
    topics = sample._topics(modules["pydoc_data/topics.py"].decode("utf8"))
    assert len(topics) > 50 and set(topics) <= set(documents)
    # Neither end of the order is of one kind: long texts are spread over it.
    half = len(documents) // 2
    first, second = (sum(len(text) > 3000 for text in part) for part in (documents[:half], documents[half:]))
    assert 0.5 < first / second < 2


def test_a_stale_partial_folder_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = [entry for entry in sample._library_modules() if entry[0] in ("argparse.py", "typing.py", "ast.py")]
    monkeypatch.setattr(sample, "_library_modules", lambda: modules)
    monkeypatch.setattr(sample, "_SMALLEST_CORPUS", 1000)
    prefix = prepare_sample(tmp_path, vocab_size=512, source="code")
    assert "Preparing the sample corpus (code of" in capsys.readouterr().err
    content = {path.name: path.read_bytes() for path in prefix.parent.iterdir()}
    for path in prefix.parent.iterdir():
        path.unlink()
    prefix.parent.rename(f"{prefix.parent}.partial")
    Path(f"{prefix.parent}.partial", "junk").touch()
    assert prepare_sample(tmp_path, vocab_size=512, source="code") == prefix
    assert {path.name: path.read_bytes() for path in prefix.parent.iterdir()} == content
    tokenizer = load_tokenizer(prefix.parent / read_header(prefix).tokenizer.file)
    text = modules[0][1].decode("utf8")
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


@pytest.mark.usefixtures("without_locks")
def test_filesystem_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sample, "_make", lambda folder, *_: folder.mkdir())
    assert prepare_sample(tmp_path).parent.is_dir()
    assert capsys.readouterr().err.count("warning: files cannot be locked on this filesystem") == 1


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="There is no sample source 'wiki': choose docs, code, both"):
        prepare_sample(tmp_path, source="wiki")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Cannot write the sample corpus to .*file.*: choose another data.cache"):
        prepare_sample(tmp_path / "file")
    monkeypatch.setenv("SEPLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"Cannot write the sample corpus to .*file.*: set SEPLLM_CACHE"):
        prepare_sample()

"""Every change of a dataset is noticed, by its header when opened or by `verify`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.sidecar import open_classes, read_header
from data_prep.train_tokenizer import train_tokenizer
from data_prep.verify import verify
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import hash_file


def _edit_header(prefix: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = Path(f"{prefix}.sep.json")
    header = json.loads(path.read_text(encoding="utf8"))
    change(header)
    path.write_text(json.dumps(header), encoding="utf8")


def _rewrite(prefix: Path, suffix: str, content: bytes) -> None:
    """Change a data file and let the header agree, so that only the deeper checks can notice."""
    path = Path(f"{prefix}{suffix}")
    path.write_bytes(content)
    info = hash_file(path)
    _edit_header(prefix, lambda header: header["files"].update({suffix: {"size": info.size, "sha256": info.sha256}}))


def test_a_whole_dataset(dataset: Path, small_tokenizer: Path) -> None:
    assert verify(dataset) == verify(dataset, small_tokenizer) == read_header(dataset)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".sep.bin"])
def test_changed_byte(dataset: Path, suffix: str) -> None:
    path = Path(f"{dataset}{suffix}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"set\{suffix} was changed after it was written"):
        verify(dataset)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".sep.bin"])
def test_truncated_and_missing_files_are_found_on_opening(dataset: Path, suffix: str) -> None:
    path = Path(f"{dataset}{suffix}")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=rf"set\{suffix} has [\d,]+ bytes where its header says [\d,]+"):
        read_header(dataset)
    path.unlink()
    with pytest.raises(UserError, match=rf"set\{suffix} is missing: the dataset .*set is incomplete"):
        read_header(dataset)


def test_headers_that_cannot_be_read(dataset: Path, tmp_path: Path) -> None:
    path = Path(f"{dataset}.sep.json")
    content = path.read_text(encoding="utf8")
    for damaged, message in (
        (content[:500], r"set\.sep\.json is not JSON \(.*\): make it again with `sepllm prepare annotate`"),
        (content.replace('"version": 1', '"version": 99'), r"has version 99, this program reads 1"),
        ("[]", r"set\.sep\.json does not hold a JSON object: make it again"),
        ("{}", r"has version None"),
        (content.replace('"tokens"', '"tocens"'), r"set\.sep\.json is damaged \(the header has no tokens\)"),
    ):
        path.write_text(damaged, encoding="utf8")
        with pytest.raises(UserError, match=message):
            read_header(dataset)
    path.unlink()
    with pytest.raises(UserError, match=r"set\.sep\.json is missing: make it with `sepllm prepare annotate"):
        read_header(dataset)
    with pytest.raises(UserError, match="There is no dataset at .*nowhere"):
        read_header(tmp_path / "nowhere")
    with pytest.raises(UserError, match="Cannot open the separator classes"):
        open_classes(tmp_path / "nowhere")


def test_another_tokenizer(dataset: Path, texts: list[str], tmp_path: Path) -> None:
    train_tokenizer(texts, tmp_path / "other.model", vocab_size=500)
    with pytest.raises(UserError, match=r"other\.model is not the tokenizer .*set was made with"):
        verify(dataset, tmp_path / "other.model")
    Path(f"{dataset}.tokenizer.model").write_bytes((tmp_path / "other.model").read_bytes())
    with pytest.raises(UserError, match=r"set\.tokenizer\.model is not the tokenizer"):
        verify(dataset)


def test_wrong_classes(dataset: Path) -> None:
    classes = np.array(open_classes(dataset))
    classes[7] ^= 1
    _rewrite(dataset, ".sep.bin", classes.tobytes())
    with pytest.raises(UserError, match=r"set\.sep\.bin does not hold the classes of its tokens"):
        verify(dataset)


def test_token_outside_the_vocabulary(dataset: Path) -> None:
    tokens = np.fromfile(f"{dataset}.bin", dtype=np.uint16)
    tokens[7] = 600
    _rewrite(dataset, ".bin", tokens.tobytes())
    with pytest.raises(UserError, match=r"set\.bin holds token id 600, outside the tokenizer's vocabulary of 600"):
        verify(dataset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["classes"][0].update(ids=[400, 401]), "another class table than its tokenizer gives"),
        (
            lambda header: header["classes"][0].update(count=1, density=1 / header["tokens"]),
            "counts its separators wrongly",
        ),
        (lambda header: header["token_bytes"].reverse(), "other byte lengths than its tokenizer gives"),
        (lambda header: header.update(documents=3), "40 documents where its header says .* 3 documents"),
    ],
)
def test_wrong_headers(dataset: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    _edit_header(dataset, change)
    with pytest.raises(UserError, match=message):
        verify(dataset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["tokenizer"].update(eod=2**40), r"tokenizer\.eod is 1099511627776, not a whole number"),
        (lambda header: header["tokenizer"].update(eod=-1), r"tokenizer\.eod is -1, not a whole number"),
        (lambda header: header["tokenizer"].update(eod=True), r"tokenizer\.eod is True, not a whole number"),
        (lambda header: header["tokenizer"].update(vocab_size="600"), r"tokenizer\.vocab_size is '600', not a whole"),
        (lambda header: header["tokenizer"].update(kind="words"), r"tokenizer\.kind is 'words', not huggingface or"),
        (lambda header: header["tokenizer"].update(file="../set"), r"tokenizer\.file is '\.\./set', not the name"),
        (lambda header: header["tokenizer"].update(sha256=None), r"tokenizer\.sha256 is None, not a SHA-256"),
        (lambda header: header.update(tokenizer=[]), r"tokenizer is \[\], not an object"),
        (lambda header: header["classes"][0].update(number=24), r"classes\[0\]\.number is 24, not a separator class"),
        (lambda header: header["classes"][0].update(number=300), r"classes\[0\]\.number is 300, not a whole number"),
        (lambda header: header["classes"][0].update(number="1"), r"classes\[0\]\.number is '1', not a whole number"),
        (lambda header: header["classes"][0].update(number=2), r"classes\[0\]\.name is 'period', not the name of"),
        (lambda header: header["classes"].append(header["classes"][0]), r"classes\[23\]\.number is 1, .* listed once"),
        (lambda header: header["classes"][0].update(ids=None), r"classes\[0\]\.ids is None, not a list of entries"),
        (lambda header: header["classes"][0].update(ids=[600, 3]), r"classes\[0\]\.ids is \[600, 3\], not a list"),
        (lambda header: header["classes"][0].update(strings=[]), r"classes\[0\]\.strings is \[\], not a list with"),
        (lambda header: header["classes"][1].update(ids=header["classes"][0]["ids"]), r"classes\[1\]\.ids is .* once"),
        (lambda header: header["classes"][0].update(count=-1), r"classes\[0\]\.count is -1, not a whole number"),
        (lambda header: header["classes"][0].update(density=0.5), r"classes\[0\]\.density is 0\.5, not count / tok"),
        (lambda header: header.update(classes={}), r"classes is \{\}, not a list"),
        (lambda header: header.update(token_bytes=[1]), r"token_bytes is \[1\], not a list of 600 lengths"),
        (lambda header: header["token_bytes"].__setitem__(9, -1), r"token_bytes\[9\] is -1, not the bytes of an entry"),
        (lambda header: header.update(tokens=0), r"tokens is 0, not a whole number from 1"),
        (lambda header: header.update(documents=1.5), r"documents is 1\.5, not a whole number"),
        (lambda header: header.update(bytes=-3), r"bytes is -3, not a whole number"),
        (lambda header: header.update(more=1), r"the header has a key 'more' that is not known"),
        (lambda header: header["files"].pop(".idx"), r"files has no \.idx"),
        (lambda header: header["files"][".idx"].update(size="1"), r"files\[\.idx\]\.size is '1', not a whole number"),
        (lambda header: header.update(tokens=header["tokens"] * 2), r".*(density|size) is .*, not (count|the)"),
        (lambda header: header.update(version=True), r"has version True, this program reads 1"),
    ],
)
def test_headers_of_wrong_values(dataset: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    """One check, which training, stats and verify read through."""
    _edit_header(dataset, change)
    for read in (read_header, verify):
        with pytest.raises(UserError, match=rf"set\.sep\.json (is damaged \()?{message}"):
            read(dataset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda header: header["tokenizer"].update(eod=7),
            "end token 7, where the tokenizer is sentencepiece",
        ),
        (lambda header: header["classes"][0]["strings"].__setitem__(0, "!"), "other strings than its tokenizer gives"),
    ],
)
def test_headers_that_the_tokenizer_contradicts(
    dataset: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    _edit_header(dataset, change)
    with pytest.raises(UserError, match=message):
        verify(dataset)


def test_reading_a_side_car_is_light() -> None:
    heavy = ("torch", "megatron", "tokenizers", "sentencepiece", "tqdm", "sepllm_train.")
    light = ("sepllm_train.base",)
    found = f"[name for name in sys.modules if name.startswith({heavy}) and not name.startswith({light})]"
    code = f"import sys, data_prep.sidecar; print({found})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

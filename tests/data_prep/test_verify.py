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


def test_reading_a_side_car_is_light() -> None:
    heavy = ("torch", "megatron", "tokenizers", "sentencepiece", "tqdm", "sepllm_train.")
    light = ("sepllm_train.base",)
    found = f"[name for name in sys.modules if name.startswith({heavy}) and not name.startswith({light})]"
    code = f"import sys, data_prep.sidecar; print({found})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

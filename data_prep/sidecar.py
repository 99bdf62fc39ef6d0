"""The separator side-car of a tokenised dataset: `<prefix>.sep.bin` and its header `<prefix>.sep.json`.

`.sep.bin` is raw u8, the separator class of each token of `.bin` in the same order. The header is written last, so
a dataset with a header is complete. This module imports neither torch nor megatron-core.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.separators import CLASSES
from data_prep.tokenizers import Tokenizer
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import FileInfo
from sepllm_train.base.parsing import read_json

VERSION = 1
DATA_SUFFIXES = (".bin", ".idx", ".sep.bin")
HEADER_SUFFIX = ".sep.json"


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer the data was made with; `file` is the name of its copy beside the data."""

    kind: str
    file: str
    sha256: str
    vocab_size: int
    eod: int


@dataclass(frozen=True)
class ClassEntry:
    """A separator class in one dataset: its vocabulary entries (`ids`, `strings`), how many tokens it has (`count`)
    and their fraction of all tokens (`density`)."""

    number: int
    name: str
    description: str
    ids: list[int]
    strings: list[str]
    count: int
    density: float


@dataclass(frozen=True)
class SidecarHeader:
    """Everything `<prefix>.sep.json` holds.

    `bytes` are the UTF-8 bytes of the documents' text (of the tokens, where only tokens were at hand: see `annotate`).
    `token_bytes[id]` is the byte length of each vocabulary entry, 0 for the end-of-document and special tokens, so
    that bits per byte can be computed on any part of the data. `files` has an entry for each of DATA_SUFFIXES.
    """

    version: int
    tokenizer: TokenizerInfo
    classes: tuple[ClassEntry, ...]
    tokens: int
    documents: int
    bytes: int
    token_bytes: list[int]
    files: dict[str, FileInfo]


def with_suffix(prefix: str | Path, suffix: str) -> Path:
    """Path of one of the dataset's files: `<prefix><suffix>` (a dot inside the prefix stays)."""
    return Path(f"{prefix}{suffix}")


def token_lengths(token_bytes: Sequence[bytes | None], eod: int) -> NDArray[np.int64]:
    """Byte length of each vocabulary entry, i64 [V]; 0 for special entries and the end-of-document token."""
    lengths = np.array([len(entry or b"") for entry in token_bytes], dtype=np.int64)
    lengths[eod] = 0
    return lengths


def build_header(
    tokenizer: Tokenizer,
    tokenizer_file: str,
    token_bytes: Sequence[bytes | None],
    class_of_token: NDArray[np.uint8],
    class_counts: NDArray[np.int64],
    *,
    documents: int,
    text_bytes: int,
    files: Mapping[str, FileInfo],
) -> SidecarHeader:
    """Header of a dataset from the bytes and class of each vocabulary entry [V] and the tokens of each class [256]."""
    tokens = int(class_counts.sum())
    entries = []
    for entry in CLASSES:
        ids = np.flatnonzero(class_of_token == entry.number).tolist()
        strings = [(token_bytes[index] or b"").decode("utf8") for index in ids]
        count = int(class_counts[entry.number])
        entries.append(ClassEntry(**asdict(entry), ids=ids, strings=strings, count=count, density=count / tokens))
    return SidecarHeader(
        version=VERSION,
        tokenizer=TokenizerInfo(tokenizer.kind, tokenizer_file, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod),
        classes=tuple(entries),
        tokens=tokens,
        documents=documents,
        bytes=text_bytes,
        token_bytes=token_lengths(token_bytes, tokenizer.eod).tolist(),
        files=dict(files),
    )


def format_header(header: SidecarHeader) -> str:
    """The header as JSON text with one line for each top-level key and class, for people who open the file."""
    classes = ",\n".join(f"    {json.dumps(asdict(entry), ensure_ascii=False)}" for entry in header.classes)
    lines = [
        f"  {json.dumps(key)}: " + (f"[\n{classes}\n  ]" if key == "classes" else json.dumps(value, ensure_ascii=False))
        for key, value in asdict(header).items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_header(prefix: str | Path) -> SidecarHeader:
    """Read `<prefix>.sep.json` and compare the sizes of the data files with it (no hashing: see `verify`).

    Raises UserError when a file is missing, unreadable, of an unknown version, or has another size.
    """
    path = with_suffix(prefix, HEADER_SUFFIX)
    if not path.exists():
        raise UserError(_missing_header(prefix))
    content = read_json(path, "make it again with `sepllm prepare annotate`")
    version = content.get("version")
    if version != VERSION:
        raise UserError(f"{path} has version {version!r}, this program reads {VERSION}: make it again.")
    try:
        header = _header_from(content)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged (bad or missing key {error}): make it again.") from None
    _check_sizes(prefix, header)
    return header


def open_classes(prefix: str | Path) -> NDArray[np.uint8]:
    """The classes of all tokens, u8 [tokens], as a read-only memory map; raises UserError when there is no file."""
    path = with_suffix(prefix, ".sep.bin")
    try:
        return np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot open the separator classes {path}: {error}.") from None


def _header_from(content: dict[str, Any]) -> SidecarHeader:
    return SidecarHeader(
        **{
            **content,
            "tokenizer": TokenizerInfo(**content["tokenizer"]),
            "classes": tuple(ClassEntry(**entry) for entry in content["classes"]),
            "files": {suffix: FileInfo(**content["files"][suffix]) for suffix in DATA_SUFFIXES},
        }
    )


def _missing_header(prefix: str | Path) -> str:
    path = with_suffix(prefix, HEADER_SUFFIX)
    if with_suffix(prefix, ".bin").exists():
        return f"{path} is missing: make it with `sepllm prepare annotate {prefix} --tokenizer FILE`."
    return f"There is no dataset at {prefix} ({path} is missing): make it with `sepllm prepare tokenize`."


def _check_sizes(prefix: str | Path, header: SidecarHeader) -> None:
    for suffix, info in header.files.items():
        path = with_suffix(prefix, suffix)
        if not path.is_file():
            raise UserError(f"{path} is missing: the dataset {prefix} is incomplete, copy or make it again.")
        size = path.stat().st_size
        if size != info.size:
            raise UserError(
                f"{path} has {size:,} bytes where its header says {info.size:,}: copy or make the dataset again."
            )

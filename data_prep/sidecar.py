"""The separator side-car of a tokenised dataset: `<prefix>.sep.bin` and its header `<prefix>.sep.json`.

`.sep.bin` is raw u8, the separator class of each token of `.bin` in the same order. The header is written last, so
a dataset with a header is complete. This module imports neither torch nor megatron-core.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.header_check import BadHeader, check_header
from data_prep.separators import CLASSES, SPLIT_OFF
from data_prep.tokenizers import Tokenizer
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import FileInfo
from sepllm_train.base.parsing import read_json

# Version 2: the bytes of the end of a document take back those of the space that the tokenizer puts before a text.
VERSIONS = (1, 2)
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
    `token_bytes[id]` is the byte length of each vocabulary entry, 0 for special tokens, so that bits per byte can be
    computed on any part of the data. It is 0 for the end-of-document token too, or -1 where the tokenizer puts a space
    in front of each text, which is no text (version 2; version 1 counts it). `files` has an entry for each of
    DATA_SUFFIXES.
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


def token_lengths(token_bytes: Sequence[bytes | None], eod: int, prefix_bytes: int = 0) -> NDArray[np.int64]:
    """Byte length of each vocabulary entry, i64 [V]; 0 for special entries.

    The end-of-document token has -prefix_bytes: it takes back the space that the tokenizer puts in front of each text,
    so that the tokens of a document have the bytes of its text.
    """
    lengths = np.array([len(entry or b"") for entry in token_bytes], dtype=np.int64)
    lengths[eod] = -prefix_bytes
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
    lengths = token_lengths(token_bytes, tokenizer.eod, tokenizer.prefix_bytes)
    return SidecarHeader(
        version=2 if lengths[tokenizer.eod] else 1,
        tokenizer=TokenizerInfo(tokenizer.kind, tokenizer_file, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod),
        classes=tuple(entries),
        tokens=tokens,
        documents=documents,
        bytes=text_bytes,
        token_bytes=lengths.tolist(),
        files=dict(files),
    )


def format_header(header: SidecarHeader) -> str:
    """The header as JSON text with one line for each top-level key and class, for people who open the file."""
    classes = ",\n".join(f"    {json.dumps(asdict(entry), ensure_ascii=False)}" for entry in header.classes)
    # A copy of all lengths, number by number, would take longer than writing them.
    content = {**asdict(replace(header, token_bytes=[])), "token_bytes": header.token_bytes}
    lines = [
        f"  {json.dumps(key)}: " + (f"[\n{classes}\n  ]" if key == "classes" else json.dumps(value, ensure_ascii=False))
        for key, value in content.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_header(prefix: str | Path, *, data: bool = True) -> SidecarHeader:
    """Read `<prefix>.sep.json` and compare the sizes of the data files with it (no hashing: see `verify`).

    Without `data` the data files are not looked at. Raises UserError when a file is missing, unreadable, of an unknown
    version, has another size, or when a value of the header cannot be.
    """
    path = with_suffix(prefix, HEADER_SUFFIX)
    if not path.exists():
        raise UserError(_missing_header(prefix))
    content = read_json(path, "make it again with `sepllm prepare annotate`")
    version = content.get("version")
    if type(version) is not int or version not in VERSIONS:
        raise UserError(
            f"{path} has version {version!r}, this program reads {' and '.join(map(str, VERSIONS))}: make it again."
        )
    try:
        check_header(content, SidecarHeader, TokenizerInfo, ClassEntry, DATA_SUFFIXES)
    except BadHeader as error:
        raise UserError(f"{path} is damaged ({error}): make it again with `sepllm prepare annotate`.") from None
    header = _header_from(content)
    if data:
        check_sizes(prefix, header.files)
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


def check_known(prefix: str | Path, header: SidecarHeader, tier: Sequence[int], key: str) -> None:
    """Raise UserError when the side-car does not tell the classes apart that `tier` does: it was made before one of
    them was there.

    tier: what each class number gets, 0 for none [256]. key: the setting or option that chose the classes.
    """
    names, known = {entry.number: entry.name for entry in CLASSES}, {entry.number for entry in header.classes}
    remedy = f"make the side-car again with `sepllm prepare annotate {prefix} --tokenizer FILE --overwrite`"
    for number, name in names.items():
        older = SPLIT_OFF.get(number)
        if number in known:
            continue
        if older in known and tier[number] != tier[older]:
            raise UserError(
                f"{key} tells {names[older]} from {name}, which the side-car of {prefix} counts as one class, "
                f"clause_mixed: name that, or {remedy}."
            )
        if older not in known and tier[number]:
            raise UserError(f"{key} names {name}, a class that the side-car of {prefix} does not know: {remedy}.")


def dataset_prefix(name: str | Path) -> Path:
    """Prefix of a dataset from what a user typed: also the name of one of its files, and `~` for the home folder."""
    text = os.path.expanduser(name)
    suffix = next((suffix for suffix in (HEADER_SUFFIX, ".sep.bin", ".bin", ".idx") if text.endswith(suffix)), "")
    return Path(text.removesuffix(suffix))


def _missing_header(prefix: str | Path) -> str:
    path = with_suffix(prefix, HEADER_SUFFIX)
    if with_suffix(prefix, ".bin").exists():
        return f"{path} is missing: make it with `sepllm prepare annotate {prefix} --tokenizer FILE`."
    return f"There is no dataset at {prefix} ({path} is missing): make it with `sepllm prepare tokenize`."


def check_sizes(prefix: str | Path, files: Mapping[str, FileInfo]) -> None:
    """Raise UserError unless the files of a dataset, by suffix, are there in the sizes that its header gives."""
    for suffix, info in files.items():
        path = with_suffix(prefix, suffix)
        if not path.is_file():
            raise UserError(f"{path} is missing: the dataset {prefix} is incomplete, copy or make it again.")
        size = path.stat().st_size
        if size != info.size:
            raise UserError(
                f"{path} has {size:,} bytes where its header says {info.size:,}: copy or make the dataset again."
            )

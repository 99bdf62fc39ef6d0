"""Shape check of a side-car's header: every reader of a dataset takes the same ones and refuses the others."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from data_prep.separators import CLASSES, EARLIER_NAMES

_LARGEST_COUNT = 2**63 - 1
_LARGEST_VOCABULARY = 2**31 - 1
_LONGEST_ENTRY = 2**20
_KINDS = ("huggingface", "sentencepiece")
_SHA256 = re.compile("[0-9a-f]{64}")


class BadHeader(Exception):
    """A key of a header that cannot be: the message names it."""


def check_header(content: dict[str, Any], shape: type, tokenizer: type, entry: type, suffixes: Collection[str]) -> None:
    """Raise BadHeader unless the JSON object of a header has the fields of the dataclass `shape` and values that fit.

    tokenizer, entry: dataclasses of the header's parts; suffixes: of the files that it describes.
    """
    _keys("the header", content, [field.name for field in fields(shape)])
    tokens = _whole("tokens", content["tokens"], 1, _LARGEST_COUNT)
    _whole("documents", content["documents"], 1, _LARGEST_COUNT)
    _whole("bytes", content["bytes"], 0, _LARGEST_COUNT)
    entries = _check_tokenizer(content["tokenizer"], tokenizer)
    _check_classes(content["classes"], entry, entries, tokens)
    _check_token_bytes(content["token_bytes"], entries, content["version"], content["tokenizer"]["eod"])
    _check_files(content["files"], suffixes)
    if content["files"][".sep.bin"]["size"] != tokens:
        _refuse("files[.sep.bin].size", content["files"][".sep.bin"]["size"], f"the {tokens:,} tokens")


def check_shard(content: dict[str, Any], shape: type, tokenizer: type, inputs: type, suffixes: Collection[str]) -> None:
    """Raise BadHeader unless the JSON object of a shard has the fields of the dataclass `shape` and values that fit.

    tokenizer, inputs: dataclasses of its parts; suffixes: of the files that it describes.
    """
    _keys("the header", content, [field.name for field in fields(shape)])
    for key in ("tokens", "documents", "bytes", "skipped", "empty"):
        _whole(key, content[key], 0, _LARGEST_COUNT)
    _whole("shard", content["shard"], 1, _whole("shards", content["shards"], 1, _LARGEST_COUNT))
    _text("field", content["field"])
    if not isinstance(content["unwrap"], bool):
        _refuse("unwrap", content["unwrap"], "true or false")
    _check_tokenizer(content["tokenizer"], tokenizer)
    _keys("inputs", content["inputs"], [field.name for field in fields(inputs)])
    files = _whole("inputs.files", content["inputs"]["files"], 1, _LARGEST_COUNT)
    _whole("inputs.bytes", content["inputs"]["bytes"], 0, _LARGEST_COUNT)
    _sha256("inputs.sha256", content["inputs"]["sha256"])
    for key in ("begin", "end"):
        place = content[key]
        if not isinstance(place, list) or len(place) != 2:
            _refuse(key, place, "a file and a place in it")
        _whole(f"{key}[0]", place[0], 0, files)
        _whole(f"{key}[1]", place[1], 0, _LARGEST_COUNT)
    _check_files(content["files"], suffixes)


def _check_files(files: Any, suffixes: Collection[str]) -> None:
    """Sizes and hashes of the files with these suffixes."""
    _keys("files", files, suffixes)
    for suffix, info in files.items():
        _keys(f"files[{suffix}]", info, ("size", "sha256"))
        _whole(f"files[{suffix}].size", info["size"], 0, _LARGEST_COUNT)
        _sha256(f"files[{suffix}].sha256", info["sha256"])


def _check_tokenizer(info: Any, shape: type) -> int:
    """Check the tokenizer's record; gives the entries of its vocabulary."""
    _keys("tokenizer", info, [field.name for field in fields(shape)])
    if info["kind"] not in _KINDS:
        _refuse("tokenizer.kind", info["kind"], " or ".join(_KINDS))
    _text("tokenizer.file", info["file"])
    # The copy lies beside the data: a name with folders would read some other file.
    if info["file"] in ("", ".", "..") or Path(info["file"]).name != info["file"] or "\0" in info["file"]:
        _refuse("tokenizer.file", info["file"], "the name of a file")
    _sha256("tokenizer.sha256", info["sha256"])
    entries = _whole("tokenizer.vocab_size", info["vocab_size"], 1, _LARGEST_VOCABULARY)
    _whole("tokenizer.eod", info["eod"], 0, entries - 1)
    return entries


def _check_classes(classes: Any, shape: type, entries: int, tokens: int) -> None:
    """Numbers that this program knows, each once, with entries of the vocabulary that no other class has."""
    if not isinstance(classes, list):
        _refuse("classes", classes, "a list")
    names = {entry.number: {entry.name, *EARLIER_NAMES.get(entry.number, ())} for entry in CLASSES}
    numbers: set[int] = set()
    taken: set[int] = set()
    count = 0
    for place, entry in enumerate(classes):
        key = f"classes[{place}]"
        _keys(key, entry, [field.name for field in fields(shape)])
        number = _whole(f"{key}.number", entry["number"], 1, 255)
        if number not in names or number in numbers:
            _refuse(f"{key}.number", number, "a separator class that this version knows, listed once")
        numbers.add(number)
        _text(f"{key}.name", entry["name"])
        if entry["name"] not in names[number]:
            _refuse(f"{key}.name", entry["name"], f"the name of class {number}, {min(names[number])}")
        _text(f"{key}.description", entry["description"])
        _check_ids(key, entry, entries, taken)
        count += _whole(f"{key}.count", entry["count"], 0, tokens)
        density = entry["density"]
        if (
            not isinstance(density, int | float)
            or isinstance(density, bool)
            or not math.isclose(density, entry["count"] / tokens, rel_tol=1e-9, abs_tol=1e-12)
        ):
            _refuse(f"{key}.density", density, "count / tokens")
    if count > tokens:
        _refuse("the sum of classes[].count", count, f"at most the {tokens:,} tokens")


def _check_ids(key: str, entry: dict[str, Any], entries: int, taken: set[int]) -> None:
    """Vocabulary entries of a class, which are added to `taken`, and their strings."""
    ids, strings = entry["ids"], entry["strings"]
    if not isinstance(ids, list) or not all(type(index) is int and 0 <= index < entries for index in ids):
        _refuse(f"{key}.ids", ids, f"a list of entries of the vocabulary, below {entries:,}")
    if len(set(ids)) < len(ids) or taken & set(ids):
        _refuse(f"{key}.ids", ids, "entries that are in one class, once")
    taken.update(ids)
    if not isinstance(strings, list) or len(strings) != len(ids) or not all(isinstance(one, str) for one in strings):
        _refuse(f"{key}.strings", strings, "a list with a string for each of ids")


def _check_token_bytes(lengths: Any, entries: int, version: int, eod: int) -> None:
    """Bytes of each vocabulary entry; from version 2 on, the end of a document may take back those of a space."""
    if not isinstance(lengths, list) or len(lengths) != entries:
        _refuse("token_bytes", lengths, f"a list of {entries:,} lengths")
    for index, length in enumerate(lengths):
        least = -_LONGEST_ENTRY if version > 1 and index == eod else 0
        if type(length) is not int or not least <= length <= _LONGEST_ENTRY:
            _refuse(f"token_bytes[{index}]", length, "the bytes of an entry of the vocabulary")


def _keys(key: str, value: Any, names: Collection[str]) -> None:
    """An object with these keys and no other."""
    if not isinstance(value, dict):
        _refuse(key, value, "an object")
    for name in names:
        if name not in value:
            raise BadHeader(f"{key} has no {name}")
    for name in value:
        if name not in names:
            raise BadHeader(f"{key} has a key {name[:40]!r} that is not known")


def _whole(key: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        _refuse(key, value, f"a whole number from {least:,} to {most:,}")
    return int(value)


def _text(key: str, value: Any) -> None:
    # JSON can spell half a surrogate pair, which can be neither printed nor the name of a file.
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        _refuse(key, value, "a text")


def _sha256(key: str, value: Any) -> None:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        _refuse(key, value, "a SHA-256 of 64 hexadecimal digits")


def _refuse(key: str, value: Any, expected: str) -> NoReturn:
    found = repr(value)
    raise BadHeader(f"{key} is {found if len(found) <= 40 else found[:40] + '...'}, not {expected}")

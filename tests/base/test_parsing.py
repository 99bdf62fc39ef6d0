"""Readers of JSON and YAML that others may have written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sepllm_train.base import parsing
from sepllm_train.base.errors import UserError
from sepllm_train.base.parsing import (
    parse_json,
    parse_yaml,
    read_json,
    read_json_if_any,
    read_json_lines,
    read_yaml,
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b'{"a": 1', "is not JSON (line 1: Expecting ',' delimiter)"),
        (b'{"a":\n1,\n}', "is not JSON (line 3: "),
        (b"[1]", "does not hold a JSON object"),
        (b'"\xff"', "is not UTF-8 text"),
        (b'{"a": NaN}', "is not JSON of this kind (NaN, which is not a number of JSON)"),
        (b'{"a": -Infinity}', "is not JSON of this kind (-Infinity, which is not a number of JSON)"),
        (b'{"a": 1e999}', "is not JSON of this kind (the number 1e999, beyond the range of floats)"),
        (b'{"a": ' + b"9" * 400 + b"}", "is not JSON of this kind (a number of 400 digits)"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON of this kind (a number of 5000 digits)"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "is not JSON of this kind (nested too deeply)"),
        (b"[" * 100_000, "is not JSON of this kind (nested too deeply)"),
        (b" " * 65, "has 65 bytes, too many"),
    ],
    ids=[
        "none",
        "torn",
        "third_line",
        "list",
        "bytes",
        "nan",
        "infinity",
        "float",
        "integer",
        "digits",
        "65_levels",
        "deep",
        "large",
    ],
)
def test_what_is_not_json_is_reported_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, words: str
) -> None:
    path = tmp_path / "some.json"
    if content is not None:
        path.write_bytes(content)
        monkeypatch.setattr(parsing, "LARGEST_JSON", 64 if words.startswith("has") else parsing.LARGEST_JSON)
    with pytest.raises(UserError) as refused:
        read_json(path, "make it again")
    message = str(refused.value)
    assert message.startswith(f"{path} {words}") and message.endswith(": make it again.") and "\n" not in message
    kept = any(number in words for number in ("NaN", "Infinity", "1e999"))
    assert list(read_json_if_any(path)) == (["a"] if kept else [])


def test_a_folder_or_a_link_to_nothing_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a plain file: no"):
        read_json(tmp_path, "no")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="link does not exist: no"):
        read_json(tmp_path / "link", "no")


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    assert parse_json(b"\xef\xbb\xbf[1]", "x", "no") == [1] == parse_json("\ufeff[1]", "x", "no")
    (tmp_path / "lines").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert list(read_json_lines(tmp_path / "lines", "no")) == [(1, {"a": 1}), (4, {"a": 2})]
    (tmp_path / "lines").write_bytes(b'{"a": 1}\n[]\n')
    with pytest.raises(UserError, match="lines line 2 does not hold a JSON object: no"):
        list(read_json_lines(tmp_path / "lines", "no"))


def test_numbers_keep_their_values() -> None:
    text = "[18446744073709551615, -1, 0.1234567890123456789, 1e308, 1e-400, 12345678901234567890]"
    assert parse_json(text, "x", "no") == [2**64 - 1, -1, 0.1234567890123456789, 1e308, 0.0, 12345678901234567890]
    assert parse_json("[1e999]", "x", "no", nan=True) == [math.inf]


def laughs() -> str:
    """Ten levels of ten aliases each: ten billion words."""
    lines = ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    for level in range(1, 10):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (laughs(), "is not YAML (line 2: an alias, which stored files do not have)"),
        ("a: [1", "is not YAML (line 1: "),
        ("- 1", "does not hold a YAML mapping"),
        ("a: !!python/object/apply:os.system [ls]", "is not YAML (line 1: could not determine a constructor"),
        ("a: " + "[" * 65 + "]" * 65, "is not YAML of this kind (nested too deeply)"),
        ("a: " + "[" * 100_000, "is not YAML of this kind (nested too deeply)"),
        ("a: " + "9" * 5000, "is not YAML of this kind (a number of 5000 digits)"),
        ("a: \x00", "is not YAML ("),
        ("a: 'x'\n" + "#" * parsing.LARGEST_YAML, "has 1,048,583 bytes, too many for a YAML file"),
        ("? [1, 2]\n: 3", "is not YAML (line 1: found unhashable key)"),
    ],
    ids=["laughs", "torn", "list", "object", "65 levels", "deep", "digits", "null", "large", "key"],
)
def test_what_is_not_stored_yaml_is_reported_in_one_sentence(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as refused:
        read_yaml(path, "make it again")
    message = str(refused.value)
    assert message.startswith(f"{path} {words}") and message.endswith(": make it again.") and "\n" not in message


def values() -> Iterator[object]:
    yield from (0, -1, 0.1, 1e-5, 6e-4, 1e20, -2.5e-300, 10**15, math.inf, True, None)
    yield from (
        "1e-3",
        "10",
        "0x10",
        "1:30",
        "2024-01-15",
        "yes",
        "null",
        "~",
        "",
        "${oc.env:HOME}",
        "ü",
        "a: b",
        ".inf",
    )


@pytest.mark.parametrize("value", list(values()), ids=repr)
def test_what_omegaconf_writes_is_read_as_it_was(value: object) -> None:
    text = OmegaConf.to_yaml(OmegaConf.create({"a": {"b": [value]}}))
    found = parse_yaml(text, "x", "no")["a"]["b"][0]
    assert found == value and type(found) is type(value)


def test_half_of_a_character_is_refused(tmp_path: Path) -> None:
    """It could be neither printed nor the name of a file."""
    path = tmp_path / "some.json"
    path.write_text(r'{"name": "\ud83d\ude00"}')
    assert read_json(path, "make it again") == {"name": "\U0001f600"}
    for content in (r'{"name": "a\ud800"}', r'{"\uDC00": 1}'):
        path.write_text(content)
        with pytest.raises(UserError, match="half of a character"):
            read_json(path, "make it again")

"""The reader of JSON, and folders that are there whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sepllm_train.base import files
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import read_json, read_json_if_any, restore_folder, whole_folder, write_json


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b'{"a": 1', "is not JSON (line 1: Expecting ',' delimiter)"),
        (b'{"a":\n1,\n}', "is not JSON (line 3: "),
        (b"[1]", "does not hold a JSON object"),
        (b'"\xff"', "is not UTF-8 text"),
        (b'{"a": NaN}', "is not JSON (line 1: NaN is not a number of JSON)"),
        (b'{"a": -Infinity}', "is not JSON (line 1: -Infinity is not a number of JSON)"),
        (b"[" * 100_000, "is not JSON of this kind (nested too deeply)"),
        (b" " * 65, "has 65 bytes, too many"),
    ],
    ids=["none", "torn", "third line", "list", "bytes", "nan", "infinity", "deep", "large"],
)
def test_what_is_not_json_is_reported_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, words: str
) -> None:
    path = tmp_path / "some.json"
    if content is not None:
        path.write_bytes(content)
        monkeypatch.setattr(files, "LARGEST_JSON", 64 if words.startswith("has") else files.LARGEST_JSON)
    with pytest.raises(UserError) as refused:
        read_json(path, "make it again")
    message = str(refused.value)
    assert message.startswith(f"{path} {words}") and message.endswith(": make it again.") and "\n" not in message
    kept = {"nan", "infinity"} & set(words.lower().replace("-", "").split())
    assert list(read_json_if_any(path)) == (["a"] if kept else [])


def test_a_folder_or_a_link_to_nothing_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a plain file: no"):
        read_json(tmp_path, "no")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="link does not exist: no"):
        read_json(tmp_path / "link", "no")


def test_written_json_is_read_again(tmp_path: Path) -> None:
    content = {"words": "µ", "number": 0.1, "nothing": None, "not a number": math.nan}
    write_json(tmp_path / "a.json", content, indent=2)
    assert (tmp_path / "a.json").read_text().endswith("\n}\n")
    found = read_json(tmp_path / "a.json", "no", nan=True)
    assert json.dumps(found) == json.dumps(content)


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for content in ("first", "second"):
        with whole_folder(target) as aside:
            assert aside == tmp_path / "target.partial"
            (aside / "file").write_text(content)
        assert [path.name for path in tmp_path.iterdir()] == ["target"]
        assert (target / "file").read_text() == content


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(ZeroDivisionError), whole_folder(target):
        raise ZeroDivisionError
    refused = pytest.raises(UserError, match=f"cannot write {target} \\(No space left\\): choose another name.")
    with refused, whole_folder(target, "choose another name"):
        raise OSError(28, "No space left")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_kill_between_the_renames_is_put_in_order(tmp_path: Path) -> None:
    target, old = tmp_path / "target", tmp_path / "target.removed.partial"
    old.mkdir()
    restore_folder(target)
    assert target.is_dir() and not old.exists()
    old.mkdir()
    restore_folder(target)
    assert target.is_dir() and not old.exists()

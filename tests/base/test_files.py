"""The reader of JSON, and folders that are there whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sepllm_train.base.errors import UserError
from sepllm_train.base.files import restore_folder, whole_folder, write_json
from sepllm_train.base.parsing import read_json


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

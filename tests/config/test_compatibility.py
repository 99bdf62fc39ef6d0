"""Keys of checkpoints and run.json: stored files with the old keys are read as today's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.base.errors import UserError
from sepllm_train.config.compatibility import (
    DATA,
    EARLIER_DATA,
    TOKENIZER,
    VALIDATION_DATA,
    same_data,
    with_current_keys,
)
from sepllm_train.runs.records import read_run as read_records
from sepllm_train.training.checkpoint import check_identity, read_state
from sepllm_train.training.run_folder import read_run_json


def test_a_stored_checkpoint_is_read_with_current_keys(golden_files: Path) -> None:
    path = golden_files / "run" / "checkpoints" / "step_00000004"
    stored = json.loads((path / "state.json").read_text())["identity"]
    found = read_state(path)["identity"]
    assert list(found[DATA]) == ["guide"] and found[VALIDATION_DATA] == {} and len(found[TOKENIZER]) == 64
    assert not [key for key in found if " " in key] and [key for key in stored if " " in key]
    assert list(found.values()) == list(stored.values())


@pytest.mark.parametrize("name", ["run", "suite/paper-toy/runs/sep_128_seed1"], ids=["run", "suite"])
def test_a_stored_run_is_read_with_current_keys(golden_files: Path, name: str) -> None:
    folder = golden_files / name
    for info in (read_run_json(folder), read_records(folder).info):
        assert {DATA, TOKENIZER} <= info["identity"].keys()
        assert not [key for key in info["identity"] if " " in key]


def test_content_without_identity_stays() -> None:
    assert with_current_keys({}) == {} and with_current_keys({"identity": None}) == {"identity": None}
    old = {"identity": {"earlier data (hash of the tokens)": [{}], "seed": 1}, "name": "a"}
    assert with_current_keys(old) == {"identity": {EARLIER_DATA: [{}], "seed": 1}, "name": "a"}


SOURCE = {"sha256": "1", "index": "2", "separators": "3", "weight": 0.333333333333}
OLD = {"sha256": "1", "weight": 0.333333}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (SOURCE, SOURCE, True),
        (SOURCE, OLD, True),
        (SOURCE, {**SOURCE, "index": "9"}, False),
        (SOURCE, {**SOURCE, "separators": "9"}, False),
        (SOURCE, {**SOURCE, "sha256": "9"}, False),
        (SOURCE, {**SOURCE, "weight": 0.333333333334}, False),
        (SOURCE, {**OLD, "weight": 0.4}, False),
        (SOURCE, {**OLD, "sha256": "9"}, False),
        (OLD, {**SOURCE, "packing": "documents"}, False),
        ("1", {"sha256": "1", "index": "2", "separators": "3"}, True),
        ("9", {"sha256": "1", "index": "2", "separators": "3"}, False),
    ],
)
def test_records_of_data_of_any_age(one: Any, other: Any, same: bool) -> None:
    """Compared in the keys that both have, wherever they are kept: by name, and in lists of earlier data."""
    for wrap in (
        lambda value: {"a": value},
        lambda value: [{"data": {"a": value}, "validation_fraction": 0.1}],
    ):
        assert same_data(wrap(one), wrap(other)) is same is same_data(wrap(other), wrap(one))
    assert not same_data({"a": one}, {"b": one}) and not same_data({"a": one}, {}) and not same_data({"a": one}, None)


def test_another_tokenizer_is_reported_in_words() -> None:
    found, wanted = {TOKENIZER: "1" * 64}, {TOKENIZER: "2" * 64}
    with pytest.raises(UserError) as refused:
        check_identity(found, wanted, "runs/a", "choose another name=")
    assert str(refused.value) == (
        "runs/a was written with a tokenizer of SHA-256 111111111111..., this run has one of 222222222222...: choose "
        "another name=."
    )

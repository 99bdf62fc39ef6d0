"""The names of docs/api.md can be imported."""

from __future__ import annotations

import importlib
import re

import pytest

from tests.docs.markdown import table

IMPORTS = [
    (module, name)
    for row in table("docs/api.md", "import")
    for module, names in re.findall(r"`from ([\w.]+) import ([\w, ]+)`", row[0])
    for name in names.split(", ")
]


@pytest.mark.parametrize(("module", "name"), IMPORTS, ids=lambda part: part)
def test_names_can_be_imported(module: str, name: str) -> None:
    if module == "sepllm_train.hf":
        pytest.importorskip("transformers", reason="transformers is not installed")
    assert hasattr(importlib.import_module(module), name)


def test_every_row_is_read() -> None:
    assert len({module for module, _ in IMPORTS}) >= 8

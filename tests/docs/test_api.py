"""The names of docs/api.md can be imported."""

from __future__ import annotations

import importlib
import re

import pytest

from tests.docs.markdown import table

ROWS = {row[0].strip("`"): re.findall(r"`(\w+)`", row[1]) for row in table("docs/api.md", "module")}


@pytest.mark.parametrize("module", ROWS)
def test_names_can_be_imported(module: str) -> None:
    if module == "sepllm_train.hf":
        pytest.importorskip("transformers", reason="transformers is not installed")
    found = importlib.import_module(module)
    assert ROWS[module] and [name for name in ROWS[module] if not hasattr(found, name)] == []

"""Triton in tests: where it is missing, what needs it is skipped; its interpreter runs with the repairs it needs."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

NO_TRITON = "Triton is not installed: it is available for Linux only"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason=NO_TRITON)

REPAIRS = Path(__file__).resolve().parents[1] / "attention" / "interpreter"


def with_repairs(environment: dict[str, str]) -> dict[str, str]:
    """An environment in which Triton's interpreter, where a process has it on, is repaired (REPAIRS/sitecustomize)."""
    paths = (str(REPAIRS), environment.get("PYTHONPATH", ""))
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}

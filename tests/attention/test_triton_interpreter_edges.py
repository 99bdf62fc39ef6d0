"""The edges of interpreter_cases.py, in a file of their own for another test process to take."""

from __future__ import annotations

import pytest

from tests.attention.interpreter_process import passes_in_the_interpreter
from tests.support.triton_support import NO_TRITON

pytest.importorskip("triton", reason=NO_TRITON)


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    passes_in_the_interpreter("interpreter_cases.py", "test_edge")

"""The Triton kernels in Triton's interpreter: interpreter_cases.py but for its edges, which have their own file."""

from __future__ import annotations

import pytest

from tests.attention.interpreter_process import passes_in_the_interpreter
from tests.support.triton_support import NO_TRITON

pytest.importorskip("triton", reason=NO_TRITON)

PARTS = {"masks": "test_any_mask", "behaviour": "not test_edge and not test_any_mask"}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_in_the_interpreter(part: str) -> None:
    passes_in_the_interpreter("interpreter_cases.py", PARTS[part])

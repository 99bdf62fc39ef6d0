"""Ends a program that cannot do without Triton, with one message and exit code 2, where Triton is not installed.

Imported for that effect, before the modules that import Triton.
"""

from __future__ import annotations

from sep_attention.triton.tuning import TRITON_INSTALLED

from benchmarks.common import NO_TRITON, exit_with
from sepllm_train.base.errors import UserError


def _refuse() -> int:
    raise UserError(NO_TRITON)


if not TRITON_INSTALLED:
    exit_with(_refuse)

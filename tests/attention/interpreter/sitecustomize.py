"""Repairs of Triton's interpreter, for tests.

Python imports a module of this name at start-up: the folder stands on the PYTHONPATH of what the tests start, so that
the processes which these start in turn have the repairs too.
"""

from __future__ import annotations

import os
from typing import Any


def _repair_masks(builder: Any) -> None:
    """Loads and stores take masks that are not of bool.

    The interpreter labels what a comparison of integers gives as an integer, and a scalar one becomes an array of
    int32 where it is broadcast. Up to 3.8 such a mask was used as it is, 3.9 raises "mask has unsupported dtype".
    """

    def with_bool(method: Any, position: int) -> Any:
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            mask = arguments[position]
            if mask.data.dtype != bool:
                mask = type(mask)(mask.data.astype(bool), mask.dtype)
            return method(self, *arguments[:position], mask, *arguments[position + 1 :], **options)

        return call

    builder.create_masked_load = with_bool(builder.create_masked_load, 1)
    builder.create_masked_store = with_bool(builder.create_masked_store, 2)


def _repair_integers(interpreter: Any) -> None:
    """Scalars as loop bounds: 3.6 applies int() to the array of one element that holds them, which NumPy 2.4 refuses.

    From 3.7 on the interpreter squeezes the array first.
    """
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _repair() -> None:
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    _repair_masks(interpreter.InterpreterBuilder)
    if "_patch_lang_tensor" in vars(interpreter):
        _repair_integers(interpreter)


if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    _repair()

"""How programs tell a user's mistake: one sentence, once, exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from data_prep.errors import UserError

__all__ = ["EXIT_USER_ERROR", "UserError", "exit_on_user_error"]

EXIT_USER_ERROR = 2


def exit_on_user_error(program: Callable[[], None]) -> None:
    """Run `program`; a UserError is printed by rank 0 as its sentence alone and ends the process with code 2."""
    try:
        program()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            sys.stdout.flush()
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_USER_ERROR) from None

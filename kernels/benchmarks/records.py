"""What the programs of this folder share: where results go, writing them whole, and how a program ends."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sepllm_train.base.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
NO_TRITON = "Triton is not installed: this program needs it, and it is available for Linux only (pip install triton)."


def write_text(path: Path, text: str) -> None:
    """Writes a file whole: aside, fsync, rename. Raises UserError when it cannot be written."""
    aside = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "w", encoding="utf8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from None


def write_json(path: Path, content: Any) -> None:
    """Writes JSON whole, one blank a level. Raises UserError when it cannot be written."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Content of a JSON file. Raises UserError when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): repair or delete it.") from None


def exit_with(program: Callable[[], int]) -> None:
    """Ends the process with the program's code, or with 2 after the one sentence of a user's mistake."""
    try:
        code = program()
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        code = 2
    raise SystemExit(code)

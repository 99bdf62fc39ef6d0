"""Shared by the benchmarks: interleaved rounds, results as JSON, and the way a program ends."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import ROOT
from sepllm_train.base.errors import UserError, exit_on_user_error
from sepllm_train.base.files import write_whole

T = TypeVar("T")
RESULTS = ROOT / "results" / "gpu"
NO_TRITON = "Triton is not installed: this program needs it, and it is available for Linux only (pip install triton)."


def interleaved(calls: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Results of each call, one a round: a busy moment of the machine affects all calls of its round.

    A warm-up round comes first and is left out. The order is reversed from round to round, so that none always follows
    the same other.
    """
    results: dict[str, list[T]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            result = calls[name]()
            if number:
                results[name].append(result)
    return results


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, with what it has queued on a GPU."""
    begin = time.perf_counter()
    call()
    # Not imported here: some of the programs do without torch.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Raise UserError for an option that is given and below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1.")


def write_text(path: Path, text: str) -> None:
    """Write a file whole. Raises UserError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from None


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole, one space a level. Raises UserError when it cannot be written."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Content of a JSON file. Raises UserError when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): repair or delete it.") from None


def exit_with(program: Callable[[], int | None]) -> None:
    """End the process with the program's exit code, or with 2 after the message of a user's mistake."""
    exit_on_user_error(lambda: sys.exit(program()))

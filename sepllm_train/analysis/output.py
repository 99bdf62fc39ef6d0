"""Shared parts of reports: results on disk with machine and command, progress, cells of tables."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError
from sepllm_train.base.figures import svg
from sepllm_train.base.files import write_whole
from sepllm_train.base.statistics import Estimate
from sepllm_train.training.run_folder import environment

READING = (
    "Losses in nats per token on held-out documents, ± one standard error over samples; differences are paired, of the "
    "same tokens. Samples of one document are not independent, so the errors are low rather than high. The weights are "
    "those of training throughout: a loss that rises under another pattern says that this model used what was taken "
    "away, not what a model trained under that pattern would reach. This is one model of one seed."
)


def check_output(folder: Path) -> None:
    """Raise UserError, before any work, when `folder` is a file or cannot be made or written to."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: name a folder.")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--output {folder}: {there} is not a folder that can be written to.")


def write_report(folder: Path, name: str, result: dict[str, Any], markdown: str, figures: Mapping[str, Figure]) -> None:
    """Write NAME.json, NAME.md and each figure as SVG, every file whole, and print the Markdown.

    The JSON gets an `environment`: command, code, packages and machine. Raises UserError when that cannot be written.
    """
    content = json.dumps(_plain({**result, "environment": environment()}), indent=1, allow_nan=False)
    files = {f"{name}.json": f"{content}\n".encode(), f"{name}.md": markdown.encode()}
    for title, figure in figures.items():
        files[f"{title}.svg"] = svg(figure).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            write_whole(folder / file, text)
    except OSError as error:
        raise UserError(f"Cannot write to --output {folder}: {error.strerror}.") from None
    say(markdown)
    say(f"Wrote {', '.join(files)} to {folder}")


def progress(total: int, unit: str) -> tqdm[Any]:
    """A bar with time left for `total` units of work; on stderr, a line a minute where that is no terminal."""
    return tqdm(total=total, unit=unit, mininterval=1 if os.isatty(2) else 60, miniters=1, dynamic_ncols=True)


def _plain(value: Any) -> Any:
    """`value` for JSON: numbers that are not finite become null, named tuples objects, others lists."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def clear_of_zero(estimate: Estimate) -> bool:
    """True where a difference is more than two standard errors from zero."""
    return not math.isnan(estimate.error) and abs(estimate.mean) > 2 * estimate.error


def shown(estimate: Estimate) -> str:
    """A loss with its standard error."""
    return f"{estimate.mean:.4f} ± {estimate.error:.4f}" if not math.isnan(estimate.error) else f"{estimate.mean:.4f}"


def signed(estimate: Estimate) -> str:
    """A difference with its standard error."""
    return f"{estimate.mean:+.4f} ± {estimate.error:.4f}" if not math.isnan(estimate.error) else f"{estimate.mean:+.4f}"

"""Input files that a user named one by one, by a folder or by a glob, what each holds, and whose share each is."""

from __future__ import annotations

import glob
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from sepllm_train.base.errors import UserError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_NAMED = 5
# A cut within an eighth of a share from the edge of a file moves there: no file is opened for a few documents.
_NEAR = 8


def kind(path: Path) -> str | None:
    """`.txt`, `.jsonl` (both also compressed) or `.parquet`; None for anything else."""
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    return suffix if suffix in (".txt", ".jsonl") or path.suffix == ".parquet" else None


def to_stderr(message: str) -> None:
    """Report to the user without touching what a program prints."""
    print(message, file=sys.stderr)


def find_inputs(names: Iterable[str | Path], report: Callable[[str], None] = to_stderr) -> list[Path]:
    """Files in the order of `names`; those of a folder (with its subfolders) or of a glob in the order of their paths.

    Hidden files, and files of a folder that are of no known kind, are left out. What is left out and the order go to
    `report`. Raises UserError for a folder or a glob without a file.
    """
    files: list[Path] = []
    for name in map(Path, names):
        if name.is_dir():
            files += _in_order(name, _of_folder(name, report), report)
        elif glob.has_magic(str(name)) and not name.exists():
            # The shell leaves a pattern in quotes as it is.
            found = (Path(path) for path in glob.glob(str(name), recursive=True))
            files += _in_order(name, [path for path in found if path.is_file()], report)
        else:
            files.append(name)
    return files


def _of_folder(folder: Path, report: Callable[[str], None]) -> list[Path]:
    """Files of known kinds that are not hidden; the others are reported."""
    taken: list[Path] = []
    left: list[Path] = []
    for path in folder.rglob("*"):
        if path.is_file():
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            (left if hidden or kind(path) is None else taken).append(path)
    if left:
        named = ", ".join(sorted(str(path.relative_to(folder)) for path in left)[:_NAMED])
        more = f" and {len(left) - _NAMED:,} more" if len(left) > _NAMED else ""
        report(f"{folder}: left out {named}{more} (hidden, or neither .txt, .jsonl nor .parquet)")
    return taken


def _in_order(name: Path, files: list[Path], report: Callable[[str], None]) -> list[Path]:
    """The files sorted by path, character by character, whatever the language of the machine."""
    if not files:
        raise UserError(f"There is no .txt, .jsonl or .parquet file in {name} (hidden files do not count).")
    files = sorted(files, key=str)
    report(f"{name}: {len(files):,} files in the order of their paths, {files[0]} to {files[-1]}")
    return files


class Part(NamedTuple):
    """The documents of input `file` that begin in its bytes [low, high); to its end where `high` is None."""

    file: int
    low: int
    high: int | None


def parts_of(sizes: Sequence[int], number: int, count: int) -> list[Part]:
    """Parts of files of these `sizes` in bytes that are share `number`, from 1 on, of `count` contiguous ones.

    Shares have as many bytes each as can be, but for cuts that move to the edge of a file within an eighth of a share.
    Raises UserError where there are more shares than bytes.
    """
    ends = list(accumulate(sizes))
    total = ends[-1] if ends else 0
    if count > max(total, 1):
        raise UserError(f"{total:,} bytes of input cannot be shared by {count:,} shards: take fewer.")
    begin, end = (_cut([0, *ends], total, cut, count) for cut in (number - 1, number))
    parts = []
    for file, (size, after) in enumerate(zip(sizes, ends, strict=True)):
        start = after - size
        # An empty file counts as a byte long, so that it is somebody's.
        if start < end and start + max(size, 1) > begin:
            parts.append(Part(file, max(begin - start, 0), end - start if end < after else None))
    return parts


def _cut(edges: list[int], total: int, cut: int, count: int) -> int:
    """Byte at which share `cut` ends and the next begins; the last ends behind empty files."""
    if cut == count:
        return total + 1
    byte = cut * total // count
    place = bisect_left(edges, byte)
    nearest = min(edges[max(place - 1, 0) : place + 1], key=lambda edge: abs(edge - byte))
    return nearest if cut and abs(nearest - byte) <= total // count // _NEAR else byte

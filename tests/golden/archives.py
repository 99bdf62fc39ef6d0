"""Stored files of tests/golden: one archive for each folder in `files/`, unpacked where they are read."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

FILES = Path(__file__).resolve().parent / "files"
NAMES = ("data", "export", "run", "run_megatron_core_0.19", "suite")
SKIPPED = (".lock", ".png", ".svg", ".html")


def pack(folder: Path, output: Path) -> Path:
    """Write the files of a folder but drawings and locks to an archive named after it.

    The same files give the same bytes.
    """
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(SKIPPED)):
            member = tarfile.TarInfo(f"{folder.name}/{path.relative_to(folder).as_posix()}")
            member.size = path.stat().st_size
            archive.addfile(member, io.BytesIO(path.read_bytes()))
    target = output / f"{folder.name}.tar.gz"
    target.write_bytes(gzip.compress(content.getvalue(), mtime=0))
    return target


def unpack(name: str, target: Path) -> Path:
    """Unpack the archive called `name` in `target`; return the folder with its files."""
    with tarfile.open(FILES / f"{name}.tar.gz") as archive:
        archive.extractall(target, filter="data")
    return target / name

"""Copies of a tokenised dataset, changed so that only the deeper checks can notice."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sepllm_train.base.files import hash_file

SUFFIXES = (".bin", ".idx", ".sep.bin", ".sep.json", ".tokenizer.model")
INDEX_HEADER = struct.Struct("<9sQBQQ")


def copy_dataset(prefix: str | Path, folder: Path, name: str | None = None) -> Path:
    """A copy of a dataset under its own name, or `name`, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / (name or Path(prefix).name)
    for suffix in SUFFIXES:
        if Path(f"{prefix}{suffix}").exists():
            Path(f"{target}{suffix}").write_bytes(Path(f"{prefix}{suffix}").read_bytes())
    edit_header(target, lambda header: header["tokenizer"].update(file=f"{target.name}.tokenizer.model"))
    return target


def edit_header(prefix: str | Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of the side-car."""
    path = Path(f"{prefix}.sep.json")
    header = json.loads(path.read_text(encoding="utf8"))
    change(header)
    path.write_text(json.dumps(header), encoding="utf8")


def rewrite(prefix: str | Path, suffix: str, content: bytes) -> None:
    """Change a data file and let the header agree."""
    path = Path(f"{prefix}{suffix}")
    path.write_bytes(content)
    info = hash_file(path)
    edit_header(prefix, lambda header: header["files"].update({suffix: {"size": info.size, "sha256": info.sha256}}))


def index_bytes(
    lengths: Sequence[int],
    boundaries: Sequence[int] | None = None,
    *,
    pointers: Sequence[int] | None = None,
    code: int = 8,
    itemsize: int = 2,
) -> bytes:
    """An `.idx` by megatron-core's layout; without `boundaries` each sequence is a document."""
    if pointers is None:
        pointers = [itemsize * int(end) for end in np.cumsum([0, *lengths[:-1]], dtype=np.int64)]
    if boundaries is None:
        boundaries = range(len(lengths) + 1)
    header = INDEX_HEADER.pack(b"MMIDIDX\x00\x00", 1, code, len(lengths), len(boundaries))
    arrays = (np.array(lengths, "<i4"), np.array(pointers, "<i8"), np.array(boundaries, "<i8"))
    return header + b"".join(array.tobytes() for array in arrays)


def index_lengths(prefix: str | Path) -> list[int]:
    """Lengths of the sequences of a dataset."""
    content = Path(f"{prefix}.idx").read_bytes()
    count = INDEX_HEADER.unpack_from(content)[3]
    return np.frombuffer(content, "<i4", count, INDEX_HEADER.size).tolist()

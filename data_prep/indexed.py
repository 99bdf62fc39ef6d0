"""megatron-core's indexed dataset files: `.bin` (all tokens, raw) and `.idx` (where each document lies).

Layout of `.idx`, little-endian: 9 bytes of magic, u64 version 1, u8 code of the token type, u64 number of sequences,
u64 number of document boundaries, then i32 lengths, i64 byte offsets into `.bin` and i64 document boundaries
(megatron/core/datasets/indexed_dataset.py). Written here, in a stream, because the library's builder keeps a Python
list of all documents and needs torch.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.sidecar import with_suffix
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import PartialFile

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16,
}  # fmt: skip
_CHUNK = 1 << 18
_LARGEST_DOCUMENT = 2**31 - 1


def token_dtype(vocab_size: int) -> type[np.integer[Any]]:
    """megatron-core's choice: uint16 for vocabularies under 65,500 entries, int32 for larger ones."""
    return np.uint16 if vocab_size < 65500 else np.int32


class DocumentLengths:
    """Lengths of documents in tokens, kept on disk while a dataset is being written."""

    def __init__(self, folder: Path) -> None:
        self._spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.count = 0

    def append(self, length: int) -> None:
        """Add one document; raises UserError when it is too long for the format (2**31 - 1 tokens)."""
        if length > _LARGEST_DOCUMENT:
            raise UserError(f"Document {self.count + 1} has {length:,} tokens, more than .idx can hold: split it.")
        self._spool.write(struct.pack("<i", length))
        self.count += 1

    def chunks(self) -> Iterator[NDArray[np.int32]]:
        """All lengths in order, i32, a chunk at a time."""
        self._spool.seek(0)
        while data := self._spool.read(4 * _CHUNK):
            yield np.frombuffer(data, dtype="<i4")

    def close(self) -> None:
        """Remove the spool."""
        self._spool.close()


def write_index(target: PartialFile, lengths: DocumentLengths, dtype: type[np.integer[Any]]) -> None:
    """Write `.idx` for documents of one sequence each, which is what GPT datasets hold."""
    code = next(code for code, known in _DTYPES.items() if known is dtype)
    target.write(_HEADER.pack(_MAGIC, 1, code, lengths.count, lengths.count + 1))
    for chunk in lengths.chunks():
        target.write(chunk.tobytes())
    offset = 0
    for chunk in lengths.chunks():
        ends = offset + np.cumsum(chunk, dtype=np.int64) * np.dtype(dtype).itemsize
        target.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
        offset = int(ends[-1])
    for start in range(0, lengths.count + 1, _CHUNK):
        target.write(np.arange(start, min(start + _CHUNK, lengths.count + 1), dtype="<i8").tobytes())


@dataclass(frozen=True)
class IndexedData:
    """An existing `.bin`/`.idx` pair: `tokens` is a read-only memory map of all tokens [T]."""

    tokens: NDArray[np.integer[Any]]
    documents: int


def open_indexed(prefix: str | Path) -> IndexedData:
    """Open a `.bin`/`.idx` pair of any producer and check that its parts fit together.

    Raises UserError when a file is missing, is not in this format, or has been cut short.
    """
    index_path, bin_path = with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")
    for path in (bin_path, index_path):
        if not path.is_file():
            raise UserError(f"{path} is missing: give the path of a tokenised dataset without its suffix.")
    with open(index_path, "rb") as stream:
        start = stream.read(_HEADER.size)
    if len(start) < _HEADER.size or not start.startswith(_MAGIC):
        raise UserError(f"{index_path} is not an index of megatron-core (bad first bytes): make it again.")
    _, version, code, sequences, boundaries = _HEADER.unpack(start)
    if version != 1 or code not in _DTYPES:
        raise UserError(f"{index_path} has version {version} and token type {code}, which hold no tokens known here.")
    if index_path.stat().st_size < _HEADER.size + 12 * sequences + 8 * boundaries:
        raise UserError(f"{index_path} is cut short (it announces {sequences:,} sequences): copy or make it again.")
    lengths = _map(index_path, np.int32, _HEADER.size, sequences)
    tokens = _map(bin_path, _DTYPES[code], 0, bin_path.stat().st_size // np.dtype(_DTYPES[code]).itemsize)
    expected = int(lengths.sum(dtype=np.int64))
    if bin_path.stat().st_size != expected * tokens.itemsize:
        raise UserError(
            f"{bin_path} holds {len(tokens):,} tokens where {index_path.name} says {expected:,}: copy or make it again."
        )
    return IndexedData(tokens, boundaries - 1)


def _map(path: Path, dtype: type[np.integer[Any]], offset: int, count: int) -> NDArray[np.integer[Any]]:
    if count == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def token_chunks(tokens: NDArray[Any], size: int = 1 << 22) -> Iterator[NDArray[Any]]:
    """Consecutive slices of at most `size` tokens."""
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size]

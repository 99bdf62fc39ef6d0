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

from data_prep.sidecar import SidecarHeader, with_suffix
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import PartialFile, hash_file

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

    def extend(self, lengths: NDArray[np.integer[Any]]) -> None:
        """Add documents by lengths that an `.idx` held."""
        self._spool.write(lengths.astype("<i4").tobytes())
        self.count += len(lengths)

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
    """An existing `.bin`/`.idx` pair: read-only memory maps of all tokens [T], of the lengths of its sequences in
    tokens [N], and of the first sequence of each document with the number of sequences at the end [documents + 1]."""

    tokens: NDArray[np.integer[Any]]
    lengths: NDArray[np.integer[Any]]
    boundaries: NDArray[np.integer[Any]]

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.boundaries) - 1


def open_indexed(prefix: str | Path) -> IndexedData:
    """Open a `.bin`/`.idx` pair of any producer and check all of its index, so that no reader leaves the file.

    Raises UserError when a file is missing, is not in this format, has been cut short, or when sequences do not lie one
    after the other in `.bin`, or documents not one after the other in the sequences.
    """
    index_path, bin_path = with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")
    for path in (bin_path, index_path):
        if not path.is_file():
            raise UserError(f"{path} is missing: give the path of a tokenised dataset without its suffix.")
    dtype, sequences, boundaries = _read_index_header(index_path)
    offsets = (_HEADER.size, _HEADER.size + 4 * sequences, _HEADER.size + 12 * sequences)
    data = IndexedData(
        _map(bin_path, dtype, 0, bin_path.stat().st_size // np.dtype(dtype).itemsize),
        _map(index_path, np.int32, offsets[0], sequences),
        _map(index_path, np.int64, offsets[2], boundaries),
    )
    _check_sequences(index_path, data, _map(index_path, np.int64, offsets[1], sequences))
    _check_boundaries(index_path, data)
    expected, size = int(data.lengths.sum(dtype=np.int64)), bin_path.stat().st_size
    if size != expected * data.tokens.itemsize:
        raise UserError(
            f"{bin_path} holds {len(data.tokens):,} tokens where {index_path.name} says {expected:,}: copy or make it "
            "again."
        )
    return data


def open_described(prefix: str | Path, header: SidecarHeader) -> IndexedData:
    """`open_indexed` of a dataset with a side-car, whose `header` must describe the index: its hash, the tokens, the
    documents, and a vocabulary that the tokens' type can hold. Raises UserError."""
    path = with_suffix(prefix, ".idx")
    if path.is_file() and hash_file(path) != header.files[".idx"]:
        raise UserError(f"{path} was changed after it was written (its SHA-256 differs): copy or make it again.")
    data = open_indexed(prefix)
    check_dtype(prefix, data, header.tokenizer.vocab_size)
    if (len(data.tokens), data.documents) != (header.tokens, header.documents):
        raise UserError(
            f"{prefix} holds {len(data.tokens):,} tokens and {data.documents:,} documents where its header says "
            f"{header.tokens:,} tokens and {header.documents:,} documents: annotate it again."
        )
    return data


def check_dtype(prefix: str | Path, data: IndexedData, vocab_size: int) -> None:
    """Raise UserError when the tokens' type cannot hold every id of the vocabulary: another type was declared."""
    if np.iinfo(data.tokens.dtype).max < vocab_size - 1:
        raise UserError(
            f"{with_suffix(prefix, '.idx')} declares tokens of {data.tokens.dtype}, which cannot hold the tokenizer's "
            f"{vocab_size:,} entries: it is damaged, or was made with another tokenizer."
        )


def _read_index_header(path: Path) -> tuple[type[np.integer[Any]], int, int]:
    """(type of the tokens, number of sequences, number of document boundaries) of an `.idx` that has room for them."""
    with open(path, "rb") as stream:
        start = stream.read(_HEADER.size)
    if len(start) < _HEADER.size or not start.startswith(_MAGIC):
        raise UserError(f"{path} is not an index of megatron-core (bad first bytes): make it again.")
    _, version, code, sequences, boundaries = _HEADER.unpack(start)
    if version != 1 or code not in _DTYPES:
        raise UserError(f"{path} has version {version} and token type {code}, which hold no tokens known here.")
    if not boundaries:
        raise UserError(f"{path} has no document boundaries: make it again.")
    # Beyond the boundaries, multimodal data has a byte for each sequence.
    more = path.stat().st_size - (_HEADER.size + 12 * sequences + 8 * boundaries)
    if more < 0:
        raise UserError(f"{path} is cut short (it announces {sequences:,} sequences): copy or make it again.")
    if more not in (0, sequences):
        raise UserError(f"{path} has {more:,} bytes more than its {sequences:,} sequences need: copy or make it again.")
    return _DTYPES[code], sequences, boundaries


def _check_sequences(path: Path, data: IndexedData, pointers: NDArray[np.integer[Any]]) -> None:
    """Lengths are not negative, and each sequence begins where the one before it ends."""
    position = 0
    for start in range(0, len(data.lengths), _CHUNK):
        lengths, found = data.lengths[start : start + _CHUNK], pointers[start : start + _CHUNK]
        if (negative := np.flatnonzero(lengths < 0)).size:
            number = int(negative[0])
            raise UserError(
                f"{path} is damaged (sequence {start + number + 1:,} has a length of {lengths[number]:,}): copy or "
                "make it again."
            )
        ends = position + np.cumsum(lengths, dtype=np.int64) * data.tokens.itemsize
        begins = np.concatenate([[position], ends[:-1]])
        if (moved := np.flatnonzero(begins != found)).size:
            number = int(moved[0])
            raise UserError(
                f"{path} is damaged (sequence {start + number + 1:,} lies at byte {found[number]:,}, not at "
                f"{begins[number]:,}, where the one before it ends): copy or make it again."
            )
        position = int(ends[-1])


def _check_boundaries(path: Path, data: IndexedData) -> None:
    """Boundaries rise from 0 to the number of sequences; a document may hold none."""
    boundaries, sequences = data.boundaries, len(data.lengths)
    rise = boundaries[0] == 0 and boundaries[-1] == sequences
    for start in range(0, len(boundaries), _CHUNK):
        rise = rise and bool((np.diff(boundaries[start : start + _CHUNK + 1]) >= 0).all())
    if not rise:
        raise UserError(
            f"{path} is damaged (its document boundaries do not rise from 0 to its {sequences:,} sequences): copy or "
            "make it again."
        )


def _map(path: Path, dtype: type[np.integer[Any]], offset: int, count: int) -> NDArray[np.integer[Any]]:
    if count == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def token_chunks(tokens: NDArray[Any], size: int = 1 << 22) -> Iterator[NDArray[Any]]:
    """Consecutive slices of at most `size` tokens."""
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size]

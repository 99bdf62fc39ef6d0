"""From documents to a tokenised dataset: text is read in one thread, encoded in several, written in input order.

Both tokenizer libraries release the interpreter's lock while they encode, so threads use all cores, and nothing is
copied between processes. At most a few batches are in flight: memory does not depend on the size of the corpus.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep.indexed import token_dtype
from data_prep.inputs import find_inputs
from data_prep.readers import Corpus, Document
from data_prep.sidecar import SidecarHeader
from data_prep.tokenizers import Tokenizer, load_tokenizer
from data_prep.writer import DatasetWriter, TokenWriter
from sepllm_train.base.errors import UserError

_BATCH_CHARACTERS = 1 << 18
_BATCHES_PER_WORKER = 3


@dataclass
class _Batch:
    """Pieces of text; `ends[k]`: piece k is the last of its document."""

    pieces: list[str] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)
    characters: int = 0
    position: int = 0


@dataclass(frozen=True)
class _Encoded:
    """Tokens of a batch [T] with the end-of-document tokens, and where in it documents end (exclusive)."""

    tokens: NDArray[np.integer]
    ends: list[int]
    text_bytes: int
    position: int


def tokenize_files(
    inputs: Sequence[str | Path],
    output: str | Path,
    tokenizer: str | Path,
    *,
    text_field: str = "text",
    unwrap: bool = False,
    strict: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> tuple[SidecarHeader, Corpus]:
    """Tokenise files into the dataset `output`; returns its header and the corpus with its counts.

    `workers` is the number of encoding threads (default: the cores this process may use); the result does not depend
    on it. Raises UserError for anything wrong with the input, the tokenizer or the output.
    """
    loaded = load_tokenizer(tokenizer)
    corpus = Corpus(find_inputs(inputs), text_field, strict, unwrap)
    with DatasetWriter(output, loaded, overwrite=overwrite) as writer:
        tokenize_corpus(corpus, writer, workers=workers, progress=progress)
        return writer.finish(), corpus


def tokenize_corpus(corpus: Corpus, writer: TokenWriter, *, workers: int | None, progress: bool) -> None:
    """`tokenize_documents` of a corpus, with a progress bar."""
    with tqdm(total=corpus.size, unit="B", unit_scale=True, disable=None if progress else True) as bar:
        corpus.report = lambda message: tqdm.write(message, file=sys.stderr)

        def show(position: int) -> None:
            bar.update(position - bar.n)
            elapsed = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{writer.tokens / max(elapsed, 1e-9):,.0f} tokens/s", refresh=False)

        tokenize_documents(corpus, writer, workers=workers, on_batch=show)


def tokenize_documents(
    documents: Iterable[Document],
    writer: TokenWriter,
    *,
    workers: int | None = None,
    on_batch: Callable[[int], None] = lambda position: None,
) -> None:
    """Encode documents and append them to `writer` in their order; the caller finishes the writer.

    `on_batch` gets the input position reached after each batch. Raises UserError when `workers` is below 1.
    """
    workers = usable_cores() if workers is None else workers
    if workers < 1:
        raise UserError(f"workers={workers}: at least one is needed.")
    tokenizer = writer.tokenizer
    pending: deque[Future[_Encoded]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
    try:
        with _library_threads_off():
            for batch in _batches(documents, tokenizer):
                pending.append(pool.submit(_encode, tokenizer, batch))
                if len(pending) >= _BATCHES_PER_WORKER * workers:
                    on_batch(_write(pending.popleft().result(), writer))
            while pending:
                on_batch(_write(pending.popleft().result(), writer))
    finally:
        pool.shutdown(cancel_futures=True)


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _batches(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[_Batch]:
    batch = _Batch()
    for document in documents:
        pieces = tokenizer.split(document.text)
        for number, piece in enumerate(pieces, start=1):
            batch.pieces.append(piece)
            batch.ends.append(number == len(pieces))
            batch.characters += len(piece)
            batch.position = document.position
            if batch.characters >= _BATCH_CHARACTERS:
                yield batch
                batch = _Batch()
    if batch.pieces:
        yield batch


def _encode(tokenizer: Tokenizer, batch: _Batch) -> _Encoded:
    end = np.array([tokenizer.eod], dtype=np.int32)
    parts: list[NDArray[np.int32]] = []
    ends: list[int] = []
    length = 0
    for ids, is_last in zip(tokenizer.encode_arrays(batch.pieces), batch.ends, strict=True):
        parts += [ids, end] if is_last else [ids]
        length += len(ids) + is_last
        if is_last:
            ends.append(length)
    tokens = np.concatenate(parts).astype(token_dtype(tokenizer.vocab_size))
    text_bytes = sum(len(piece) if piece.isascii() else len(piece.encode("utf8")) for piece in batch.pieces)
    return _Encoded(tokens, ends, text_bytes, batch.position)


def _write(encoded: _Encoded, writer: TokenWriter) -> int:
    writer.write(encoded.tokens, encoded.ends, encoded.text_bytes)
    return encoded.position


@contextmanager
def _library_threads_off() -> Iterator[None]:
    """Keep `tokenizers` from starting a thread per core inside each of our threads."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

"""The files of a dataset, written together and given their final names together, the side-car's header last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from data_prep.indexed import DocumentLengths, token_dtype, write_index
from data_prep.separators import classify
from data_prep.sidecar import HEADER_SUFFIX, SidecarHeader, build_header, dataset_prefix, format_header, with_suffix
from data_prep.tokenizers import Tokenizer
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import PartialFile, write_whole


def refuse_existing(prefix: Path, suffixes: Iterable[str], overwrite: bool) -> None:
    """Raise UserError when one of the output files is there already and may not be overwritten."""
    existing = [path for path in (with_suffix(prefix, suffix) for suffix in suffixes) if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} exists already: choose another name or pass --overwrite.")


def copy_tokenizer(tokenizer: Tokenizer, prefix: Path) -> str:
    """Put the tokenizer's file beside the data, so that the data travels whole; returns the copy's name."""
    target = with_suffix(prefix, tokenizer.suffix)
    write_whole(target, tokenizer.path.read_bytes())
    return target.name


class DatasetWriter:
    """Writes `.bin`, `.idx`, `.sep.bin`, the tokenizer's copy and `.sep.json`.

    Use as a context manager; without a call of `finish` nothing is left behind. Raises UserError when the folder
    cannot be written or, without `overwrite`, when the dataset exists.
    """

    def __init__(self, prefix: str | Path, tokenizer: Tokenizer, *, overwrite: bool = False) -> None:
        self.prefix = dataset_prefix(prefix)
        self.tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._token_bytes = tokenizer.token_bytes()
        self._class_of_token = classify(self._token_bytes)
        self._class_counts = np.zeros(256, dtype=np.int64)
        self._text_bytes = 0
        self._open_document = 0
        refuse_existing(self.prefix, (".bin", ".idx", HEADER_SUFFIX), overwrite)
        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Cannot make the folder {self.prefix.parent}: {error.strerror}.") from None
        with ExitStack() as stack:
            self._bin, self._index, self._classes = (
                stack.enter_context(PartialFile(with_suffix(self.prefix, suffix)))
                for suffix in (".bin", ".idx", ".sep.bin")
            )
            self._lengths = DocumentLengths(self.prefix.parent)
            stack.callback(self._lengths.close)
            self._stack = stack.pop_all()

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return int(self._class_counts.sum())

    def write(self, tokens: NDArray[np.integer], ends: Sequence[int], text_bytes: int) -> None:
        """Append tokens [T], which stand for `text_bytes` bytes of UTF-8.

        `ends` are the places in `tokens` (exclusive, each just behind an end-of-document token) where documents end;
        what follows the last one belongs to a document that the next call continues.
        """
        tokens = tokens.astype(self._dtype, copy=False)
        classes = self._class_of_token[tokens]
        self._bin.write(tokens.tobytes())
        self._classes.write(classes.tobytes())
        self._class_counts += np.bincount(classes, minlength=256)
        self._text_bytes += text_bytes
        start = -self._open_document
        for end in ends:
            self._lengths.append(end - start)
            start = end
        self._open_document = len(tokens) - start

    def finish(self) -> SidecarHeader:
        """Sync everything, give all files their final names, write the header; raises UserError without documents."""
        if not self._lengths.count:
            raise UserError("The corpus is empty: no document with text was found in the input.")
        write_index(self._index, self._lengths, self._dtype)
        outputs = {".bin": self._bin, ".idx": self._index, ".sep.bin": self._classes}
        files = {suffix: output.seal() for suffix, output in outputs.items()}
        # A header may never stand beside files that it does not describe.
        with_suffix(self.prefix, HEADER_SUFFIX).unlink(missing_ok=True)
        header = build_header(
            self.tokenizer,
            copy_tokenizer(self.tokenizer, self.prefix),
            self._token_bytes,
            self._class_of_token,
            self._class_counts,
            documents=self._lengths.count,
            text_bytes=self._text_bytes,
            files=files,
        )
        for output in outputs.values():
            output.finish()
        write_whole(with_suffix(self.prefix, HEADER_SUFFIX), format_header(header).encode("utf8"))
        return header

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

"""The files of a dataset, written together and given their final names together, the side-car's header last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from data_prep.indexed import DocumentLengths, token_dtype, write_index
from data_prep.separators import classify
from data_prep.sidecar import HEADER_SUFFIX, SidecarHeader, build_header, dataset_prefix, format_header, with_suffix
from data_prep.tokenizers import Tokenizer
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import FileInfo, PartialFile, write_whole


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


class TokenWriter:
    """Writes tokens and the places of documents, `.bin` and `.idx`; what else belongs to them is its subclasses'.

    Use as a context manager; until the files are published nothing is left behind. `suffixes` are those of the files
    that grow with the tokens, `header_suffix` that of the one written last. Raises UserError when the folder cannot be
    written or, without `overwrite`, when the output exists.
    """

    def __init__(
        self,
        prefix: str | Path,
        tokenizer: Tokenizer,
        suffixes: Sequence[str],
        header_suffix: str,
        *,
        overwrite: bool = False,
    ) -> None:
        self.prefix = dataset_prefix(prefix)
        self.tokenizer = tokenizer
        self.tokens = 0
        self.text_bytes = 0
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._header_suffix = header_suffix
        self._open_document = 0
        refuse_existing(self.prefix, (".bin", ".idx", header_suffix), overwrite)
        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Cannot make the folder {self.prefix.parent}: {error.strerror}.") from None
        with ExitStack() as stack:
            self._files = {
                suffix: stack.enter_context(PartialFile(with_suffix(self.prefix, suffix)))
                for suffix in (".bin", ".idx", *suffixes)
            }
            self._lengths = DocumentLengths(self.prefix.parent)
            stack.callback(self._lengths.close)
            self._stack = stack.pop_all()

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return self._lengths.count

    def write(self, tokens: NDArray[np.integer], ends: Sequence[int], text_bytes: int) -> None:
        """Append tokens [T], which stand for `text_bytes` bytes of UTF-8.

        `ends` are the places in `tokens` (exclusive, each just behind an end-of-document token) where documents end;
        what follows the last one belongs to a document that the next call continues.
        """
        self.write_tokens(tokens)
        self.text_bytes += text_bytes
        start = -self._open_document
        for end in ends:
            self._lengths.append(end - start)
            start = end
        self._open_document = len(tokens) - start

    def write_tokens(self, tokens: NDArray[np.integer]) -> None:
        """Append tokens [T] alone."""
        tokens = tokens.astype(self._dtype, copy=False)
        self._files[".bin"].write(tokens.tobytes())
        self.tokens += len(tokens)

    def write_lengths(self, lengths: NDArray[np.integer]) -> None:
        """Append whole documents by their lengths in tokens [D] alone."""
        self._lengths.extend(lengths)

    def _seal(self) -> tuple[str, dict[str, FileInfo]]:
        """Sync everything and copy the tokenizer; gives the copy's name and size and hash of the files by suffix."""
        write_index(self._files[".idx"], self._lengths, self._dtype)
        files = {suffix: output.seal() for suffix, output in self._files.items()}
        # A header may never stand beside files that it does not describe.
        with_suffix(self.prefix, self._header_suffix).unlink(missing_ok=True)
        return copy_tokenizer(self.tokenizer, self.prefix), files

    def _publish(self, header: str) -> None:
        """Give all sealed files their final names and write the header last."""
        for output in self._files.values():
            output.finish()
        write_whole(with_suffix(self.prefix, self._header_suffix), header.encode("utf8"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


class DatasetWriter(TokenWriter):
    """Writes `.bin`, `.idx`, `.sep.bin`, the tokenizer's copy and `.sep.json`."""

    def __init__(self, prefix: str | Path, tokenizer: Tokenizer, *, overwrite: bool = False) -> None:
        self._token_bytes = tokenizer.token_bytes()
        self._class_of_token = classify(self._token_bytes)
        self._class_counts = np.zeros(256, dtype=np.int64)
        super().__init__(prefix, tokenizer, (".sep.bin",), HEADER_SUFFIX, overwrite=overwrite)

    def write_tokens(self, tokens: NDArray[np.integer]) -> None:
        """Append tokens [T] with their classes."""
        super().write_tokens(tokens)
        classes = self._class_of_token[tokens]
        self._files[".sep.bin"].write(classes.tobytes())
        self._class_counts += np.bincount(classes, minlength=256)

    def finish(self) -> SidecarHeader:
        """Publish the dataset with its header; raises UserError without documents."""
        if not self.documents:
            raise UserError("The corpus is empty: no document with text was found in the input.")
        tokenizer_file, files = self._seal()
        header = build_header(
            self.tokenizer,
            tokenizer_file,
            self._token_bytes,
            self._class_of_token,
            self._class_counts,
            documents=self.documents,
            text_bytes=self.text_bytes,
            files=files,
        )
        self._publish(format_header(header))
        return header

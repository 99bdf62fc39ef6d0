"""Checking a dataset against its header, token by token."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.annotate import check_token_range
from data_prep.indexed import open_described, token_chunks
from data_prep.separators import as_known, classify
from data_prep.sidecar import SidecarHeader, dataset_prefix, open_classes, read_header, token_lengths, with_suffix
from data_prep.tokenizers import Tokenizer, load_tokenizer
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import hash_file


def verify(prefix: str | Path, tokenizer: str | Path | None = None) -> SidecarHeader:
    """Check lengths, hashes, tokenizer, token range and every separator class; returns the header.

    `tokenizer` is compared with the one in the header. Raises UserError naming the first mismatch.
    """
    prefix = dataset_prefix(prefix)
    header = read_header(prefix)
    for suffix, info in header.files.items():
        path = with_suffix(prefix, suffix)
        if hash_file(path) != info:
            raise UserError(f"{path} was changed after it was written (its SHA-256 differs): copy or make it again.")
    loaded = _checked_tokenizer(prefix, header, tokenizer)
    _check_tables(prefix, header, loaded)
    _check_tokens(prefix, header, loaded)
    return header


def _checked_tokenizer(prefix: Path, header: SidecarHeader, tokenizer: str | Path | None) -> Tokenizer:
    copy = load_tokenizer(prefix.parent / header.tokenizer.file)
    given = copy if tokenizer is None else load_tokenizer(tokenizer)
    for loaded in (copy, given):
        if loaded.sha256 != header.tokenizer.sha256:
            raise UserError(
                f"{loaded.path} is not the tokenizer {prefix} was made with "
                f"(SHA-256 {loaded.sha256[:12]}... instead of {header.tokenizer.sha256[:12]}...)."
            )
    return given


def _check_tables(prefix: Path, header: SidecarHeader, tokenizer: Tokenizer) -> None:
    recorded, own = header.tokenizer, (tokenizer.kind, tokenizer.vocab_size, tokenizer.eod)
    if (recorded.kind, recorded.vocab_size, recorded.eod) != own:
        raise UserError(
            f"{prefix}.sep.json has a tokenizer of kind {recorded.kind}, {recorded.vocab_size:,} entries and end token "
            f"{recorded.eod}, where the tokenizer is {own[0]}, {own[1]:,} and {own[2]}: annotate it again."
        )
    token_bytes = tokenizer.token_bytes()
    class_of_token = np.zeros(tokenizer.vocab_size, dtype=np.uint8)
    for entry in header.classes:
        class_of_token[entry.ids] = entry.number
    if not np.array_equal(class_of_token, _known_classes(header, token_bytes)):
        raise UserError(f"{prefix}.sep.json has another class table than its tokenizer gives: annotate it again.")
    if any([(token_bytes[i] or b"").decode("utf8") for i in entry.ids] != entry.strings for entry in header.classes):
        raise UserError(f"{prefix}.sep.json has other strings than its tokenizer gives: annotate it again.")
    prefix_bytes = tokenizer.prefix_bytes if header.version > 1 else 0
    if tokenizer.prefix_bytes != prefix_bytes:
        print(
            f"note: {prefix}.sep.json counts the space that its tokenizer puts in front of each document as text, so "
            "bits per byte are a little low: annotate it again to leave it out (checkpoints stay valid).",
            file=sys.stderr,
        )
    if header.token_bytes != token_lengths(token_bytes, tokenizer.eod, prefix_bytes).tolist():
        raise UserError(f"{prefix}.sep.json has other byte lengths than its tokenizer gives: annotate it again.")


def _check_tokens(prefix: Path, header: SidecarHeader, tokenizer: Tokenizer) -> None:
    data, classes = open_described(prefix, header), open_classes(prefix)
    class_of_token, counts = _known_classes(header, tokenizer.token_bytes()), np.zeros(256, dtype=np.int64)
    for chunk, stored in zip(token_chunks(data.tokens), token_chunks(classes), strict=True):
        check_token_range(chunk, tokenizer.vocab_size, prefix)
        if not np.array_equal(class_of_token[chunk], stored):
            raise UserError(f"{prefix}.sep.bin does not hold the classes of its tokens: annotate it again.")
        counts += np.bincount(stored, minlength=256)
    if any(counts[entry.number] != entry.count for entry in header.classes):
        raise UserError(f"{prefix}.sep.json counts its separators wrongly: annotate it again.")


def _known_classes(header: SidecarHeader, token_bytes: Sequence[bytes | None]) -> NDArray[np.uint8]:
    """Class of each vocabulary entry, u8 [V], by the classes that there were when the header was written."""
    return as_known(classify(token_bytes), {entry.number for entry in header.classes})

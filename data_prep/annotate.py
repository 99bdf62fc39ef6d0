"""The separator side-car of an existing megatron-core dataset, without tokenising its text again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.indexed import check_dtype, open_indexed, token_chunks
from data_prep.separators import classify
from data_prep.sidecar import (
    HEADER_SUFFIX,
    SidecarHeader,
    build_header,
    dataset_prefix,
    format_header,
    token_lengths,
    with_suffix,
)
from data_prep.tokenizers import load_tokenizer
from data_prep.writer import copy_tokenizer, refuse_existing
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import PartialFile, hash_file, write_whole


def annotate(
    prefix: str | Path, tokenizer: str | Path, *, overwrite: bool = False, progress: bool = True
) -> SidecarHeader:
    """Write `.sep.bin`, `.sep.json` and the tokenizer's copy for a `.bin`/`.idx` of any producer.

    The text is not at hand, so the header's `bytes` are those of the tokens. Raises UserError when the dataset is
    missing or damaged, has a token outside the tokenizer's vocabulary, or has a side-car already.
    """
    prefix = dataset_prefix(prefix)
    loaded = load_tokenizer(tokenizer)
    data = open_indexed(prefix)
    if not len(data.tokens):
        raise UserError(f"{with_suffix(prefix, '.bin')} holds no tokens.")
    check_dtype(prefix, data, loaded.vocab_size)
    refuse_existing(prefix, (".sep.bin", HEADER_SUFFIX), overwrite)
    token_bytes = loaded.token_bytes()
    class_of_token, lengths = classify(token_bytes), token_lengths(token_bytes, loaded.eod, loaded.prefix_bytes)
    counts, text_bytes = np.zeros(256, dtype=np.int64), 0
    with (
        PartialFile(with_suffix(prefix, ".sep.bin")) as target,
        tqdm(total=len(data.tokens), unit="token", unit_scale=True, disable=None if progress else True) as bar,
    ):
        for chunk in token_chunks(data.tokens):
            check_token_range(chunk, loaded.vocab_size, prefix)
            classes = class_of_token[chunk]
            target.write(classes.tobytes())
            counts += np.bincount(classes, minlength=256)
            text_bytes += int(lengths[chunk].sum())
            bar.update(len(chunk))
        files = {suffix: hash_file(with_suffix(prefix, suffix)) for suffix in (".bin", ".idx")}
        files[".sep.bin"] = target.seal()
        with_suffix(prefix, HEADER_SUFFIX).unlink(missing_ok=True)
        name = copy_tokenizer(loaded, prefix)
        target.finish()
    header = build_header(
        loaded, name, token_bytes, class_of_token, counts, documents=data.documents, text_bytes=text_bytes, files=files
    )
    write_whole(with_suffix(prefix, HEADER_SUFFIX), format_header(header).encode("utf8"))
    return header


def check_token_range(tokens: np.ndarray, vocab_size: int, prefix: Path) -> None:
    """Raise UserError when a token id is outside 0 .. vocab_size - 1."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"{with_suffix(prefix, '.bin')} holds token id {low if low < 0 else high}, outside the tokenizer's "
            f"vocabulary of {vocab_size:,} entries: it was made with another tokenizer."
        )

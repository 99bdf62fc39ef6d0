"""Shards of a dataset: the tokens of contiguous shares of the input, each made by a task of its own, and their merge.

A shard is `PREFIX.shard-I-of-N` with `.bin` and `.idx` as a dataset has them, the tokenizer's copy, and `.shard.json`,
which is written last. Separator classes are added by the merge.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.header_check import BadHeader, check_shard
from data_prep.indexed import IndexedData, check_dtype, open_indexed, token_chunks
from data_prep.inputs import find_inputs
from data_prep.readers import Corpus, Place
from data_prep.sidecar import SidecarHeader, TokenizerInfo, check_sizes, dataset_prefix, with_suffix
from data_prep.tokenize import tokenize_corpus
from data_prep.tokenizers import Tokenizer, load_tokenizer
from data_prep.writer import DatasetWriter, TokenWriter, refuse_existing
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import FileInfo, hash_file
from sepllm_train.base.parsing import read_json

SHARD_SUFFIX = ".shard.json"
_VERSION = 1
_CHUNK = 1 << 20
_SUFFIXES = (".bin", ".idx")
_AGAIN = "make it again with `sepllm prepare tokenize --shard`"


@dataclass(frozen=True)
class InputsInfo:
    """The input files of all shards: their number, bytes, and a SHA-256 of their names and sizes in order."""

    files: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardHeader:
    """Everything `.shard.json` holds.

    `shard` counts from 1 to `shards`. `begin` and `end` are places in the input: (file, what of it comes before).
    `field` and `unwrap` are the options that change tokens. `tokens`, `documents`, `bytes` and `files` are as in a
    dataset's header; `skipped` and `empty` documents were left out.
    """

    version: int
    shard: int
    shards: int
    inputs: InputsInfo
    field: str
    unwrap: bool
    tokenizer: TokenizerInfo
    begin: Place
    end: Place
    tokens: int
    documents: int
    bytes: int
    skipped: int
    empty: int
    files: dict[str, FileInfo]


class ShardWriter(TokenWriter):
    """Writes `.bin`, `.idx`, the tokenizer's copy and `.shard.json`, in place of what an interrupted task left."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        super().__init__(prefix, tokenizer, (), SHARD_SUFFIX, overwrite=True)

    def finish(self, corpus: Corpus) -> ShardHeader:
        """Publish the shard, which may hold no document, with its header; `corpus` has been read to its end."""
        assert corpus.begin is not None and corpus.end is not None
        name, files = self._seal()
        tokenizer = self.tokenizer
        header = ShardHeader(
            version=_VERSION,
            shard=corpus.share[0],
            shards=corpus.share[1],
            inputs=_inputs(corpus),
            field=corpus.text_field,
            unwrap=corpus.unwrap,
            tokenizer=TokenizerInfo(tokenizer.kind, name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod),
            begin=corpus.begin,
            end=corpus.end,
            tokens=self.tokens,
            documents=self.documents,
            bytes=self.text_bytes,
            skipped=corpus.skipped,
            empty=corpus.empty,
            files=files,
        )
        self._publish(json.dumps(asdict(header), indent=1) + "\n")
        return header


def shard_prefix(output: str | Path, number: int, count: int) -> Path:
    """Path of a shard without suffix."""
    return with_suffix(dataset_prefix(output), f".shard-{number}-of-{count}")


def tokenize_shard(
    inputs: Sequence[str | Path],
    output: str | Path,
    tokenizer: str | Path,
    shard: tuple[int, int],
    *,
    text_field: str = "text",
    unwrap: bool = False,
    strict: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> tuple[ShardHeader, bool]:
    """Tokenise shard (number from 1 on, count) of the documents of `inputs`, which is written beside `output`.

    Returns its header, and False where it was finished before by the same inputs and options and is left as it is.
    Raises UserError as `tokenize_files`, and for a finished shard of others.
    """
    loaded = load_tokenizer(tokenizer)
    corpus = Corpus(find_inputs(inputs), text_field, strict, unwrap, share=shard)
    prefix = shard_prefix(output, *shard)
    if with_suffix(prefix, SHARD_SUFFIX).exists() and not overwrite:
        header = read_shard(prefix)
        wanted = (shard[1], _inputs(corpus), loaded.sha256, text_field, unwrap)
        if other := _difference(_settings(header), wanted):
            raise UserError(f"{prefix} exists already and was made with another {other}: pass --overwrite.")
        return header, False
    with ShardWriter(prefix, loaded) as writer:
        tokenize_corpus(corpus, writer, workers=workers, progress=progress)
        return writer.finish(corpus), True


def read_shard(prefix: str | Path) -> ShardHeader:
    """Header of a shard, whose files have the sizes that it gives. Raises UserError."""
    path = with_suffix(prefix, SHARD_SUFFIX)
    if not path.is_file():
        raise UserError(f"{path} is missing: {prefix} is no finished shard, {_AGAIN}.")
    content = read_json(path, _AGAIN)
    if content.get("version") != _VERSION:
        raise UserError(f"{path} has version {content.get('version')!r}, this program reads {_VERSION}: {_AGAIN}.")
    try:
        check_shard(content, ShardHeader, TokenizerInfo, InputsInfo, _SUFFIXES)
    except BadHeader as error:
        raise UserError(f"{path} is damaged ({error}): {_AGAIN}.") from None
    parts: dict[str, Any] = {
        "inputs": InputsInfo(**content["inputs"]),
        "tokenizer": TokenizerInfo(**content["tokenizer"]),
        "begin": tuple(content["begin"]),
        "end": tuple(content["end"]),
        "files": {suffix: FileInfo(**content["files"][suffix]) for suffix in _SUFFIXES},
    }
    header = ShardHeader(**{**content, **parts})
    check_sizes(prefix, header.files)
    return header


def merge(
    output: str | Path, shards: Sequence[str | Path] = (), *, overwrite: bool = False, progress: bool = True
) -> tuple[SidecarHeader, list[ShardHeader]]:
    """Make the dataset `output` of all its shards, byte for byte as one process would; the shards stay.

    shards: their prefixes, in any order; without any, those beside `output`. Returns the headers of the dataset and of
    the shards in order. Raises UserError, and leaves nothing behind, for a dataset that exists and for shards that are
    missing, doubled, damaged, or do not belong together.
    """
    output = dataset_prefix(output)
    found = [(prefix, read_shard(prefix)) for prefix in _prefixes(output, shards)]
    _check_together(found)
    found.sort(key=lambda one: one[1].shard)
    _check_sequence(found)
    refuse_existing(output, (".bin", ".idx", ".sep.json"), overwrite)
    data = [_open(prefix, header) for prefix, header in found]
    loaded = load_tokenizer(found[0][0].parent / found[0][1].tokenizer.file)
    if loaded.sha256 != found[0][1].tokenizer.sha256:
        raise UserError(f"{loaded.path} was changed after {found[0][0]} was made: copy it again.")
    total = sum(header.tokens for _, header in found)
    with (
        DatasetWriter(output, loaded, overwrite=overwrite) as writer,
        tqdm(total=total, unit="token", unit_scale=True, disable=None if progress else True) as bar,
    ):
        for (prefix, header), one in zip(found, data, strict=True):
            digest = hashlib.sha256()
            # Read, not mapped: pages of a map stay in the memory of the process.
            with open(with_suffix(prefix, ".bin"), "rb") as stream:
                while len(chunk := np.fromfile(stream, one.tokens.dtype, _CHUNK)):
                    digest.update(chunk.data)
                    writer.write_tokens(chunk)
                    bar.update(len(chunk))
            if digest.hexdigest() != header.files[".bin"].sha256:
                raise UserError(_changed(with_suffix(prefix, ".bin")))
            for lengths in token_chunks(one.lengths):
                writer.write_lengths(lengths)
            writer.text_bytes += header.bytes
        return writer.finish(), [header for _, header in found]


def _prefixes(output: Path, shards: Sequence[str | Path]) -> list[Path]:
    """Prefixes of the shards that are named, or of those beside the dataset that were finished."""
    if shards:
        return [dataset_prefix(str(shard).removesuffix(SHARD_SUFFIX)) for shard in shards]
    name = re.compile(rf"{re.escape(output.name)}\.shard-\d+-of-\d+{re.escape(SHARD_SUFFIX)}")
    there = output.parent.iterdir() if output.parent.is_dir() else []
    found = [path.with_name(path.name.removesuffix(SHARD_SUFFIX)) for path in there if name.fullmatch(path.name)]
    if not found:
        raise UserError(
            f"There is no finished shard {output.name}.shard-*-of-* in {output.parent}: make them with "
            "`sepllm prepare tokenize --shard`, or name them."
        )
    return sorted(found)


def _check_together(found: Sequence[tuple[Path, ShardHeader]]) -> None:
    """All were made of the same inputs by the same options, and none is there twice or missing."""
    first, header = found[0]
    for prefix, other in found[1:]:
        if difference := _difference(_settings(other), _settings(header)):
            raise UserError(f"{prefix} was made with another {difference} than {first}: name those that go together.")
    seen: dict[int, Path] = {}
    for prefix, other in found:
        if other.shard in seen:
            raise UserError(f"{seen[other.shard]} and {prefix} are both shard {other.shard}: name one of them.")
        seen[other.shard] = prefix
    if missing := [str(number) for number in range(1, header.shards + 1) if number not in seen]:
        numbers = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise UserError(
            f"{len(missing):,} of {header.shards:,} shards are missing or unfinished ({numbers}): make them with "
            f"`sepllm prepare tokenize --shard {missing[0]}/{header.shards}`."
        )


def _check_sequence(found: Sequence[tuple[Path, ShardHeader]]) -> None:
    """Each shard begins in the input where the one before it ends: no document is lost or there twice."""
    start, end = found[0][1].begin, found[-1][1].end
    if start != (0, 0) or end != (found[0][1].inputs.files, 0):
        raise UserError(f"{found[0][0]} and the others do not hold all of the input: make all shards again.")
    for (before, one), (after, other) in pairwise(found):
        if one.end != other.begin:
            raise UserError(
                f"{before} does not end in the input where {after} begins: the input, or the versions of the libraries "
                "that read it, were not the same, make all shards again."
            )


def _open(prefix: Path, header: ShardHeader) -> IndexedData:
    """Tokens and lengths of a shard, whose index is as it was written."""
    if hash_file(with_suffix(prefix, ".idx")) != header.files[".idx"]:
        raise UserError(_changed(with_suffix(prefix, ".idx")))
    data = open_indexed(prefix)
    check_dtype(prefix, data, header.tokenizer.vocab_size)
    if (len(data.tokens), data.documents) != (header.tokens, header.documents):
        raise UserError(f"{with_suffix(prefix, SHARD_SUFFIX)} counts its tokens or documents wrongly: {_AGAIN}.")
    return data


def _changed(path: Path) -> str:
    return f"{path} was changed after it was written (its SHA-256 differs): copy or make the shard again."


def _inputs(corpus: Corpus) -> InputsInfo:
    """Names without folders and sizes of the input files, as they were when the corpus was opened."""
    files = [[path.name, size] for path, size in zip(corpus.inputs, corpus.sizes, strict=True)]
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return InputsInfo(len(files), sum(corpus.sizes), digest)


def _settings(header: ShardHeader) -> tuple[int, InputsInfo, str, str, bool]:
    """Settings that all shards of a dataset share."""
    return header.shards, header.inputs, header.tokenizer.sha256, header.field, header.unwrap


def _difference(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> str | None:
    """The first of `_settings` that differs, in words."""
    names = ("number of shards", "list of input files", "tokenizer", "--field", "--unwrap")
    return next((name for name, one, other in zip(names, found, wanted, strict=True) if one != other), None)

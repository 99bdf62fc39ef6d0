"""Prepared datasets of a run: their headers, what they must have in common, and a watch over their files."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_prep import sample
from data_prep.indexed import open_described
from data_prep.sidecar import DATA_SUFFIXES, SidecarHeader, dataset_prefix, read_header, with_suffix
from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import DataConfig
from sepllm_train.data.blend import exact_weight
from sepllm_train.distributed.collectives import on_all_ranks


@dataclass(frozen=True)
class Source:
    """One dataset of the blend. `weight` is its fraction of the training sequences, None for its fraction of tokens.
    `sequences` is the number of sequences in its .idx, of which a document may hold several."""

    prefix: str
    name: str
    weight: float | None
    header: SidecarHeader
    sequences: int

    def record(self) -> dict[str, Any]:
        """Hashes of everything that its samples depend on: tokens, document boundaries, separators."""
        files = self.header.files
        hashes = {"sha256": ".bin", "index": ".idx", "separators": ".sep.bin"}
        # Earlier versions took each sequence for a document.
        packing = {} if self.sequences == self.header.documents else {"packing": "documents"}
        return {**{key: files[suffix].sha256 for key, suffix in hashes.items()}, **packing}


@dataclass(frozen=True)
class Corpus:
    """The blend of a run, and the datasets of data.validation_prefixes."""

    sources: tuple[Source, ...]
    validation: tuple[Source, ...] = ()

    @property
    def vocabulary(self) -> int:
        """Entries of the tokenizer that made the data."""
        return self.sources[0].header.tokenizer.vocab_size

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer file."""
        return self.sources[0].header.tokenizer.sha256

    @property
    def token_bytes(self) -> list[int]:
        """UTF-8 bytes that each vocabulary entry stands for."""
        return self.sources[0].header.token_bytes

    @property
    def prefix_bytes(self) -> int:
        """Bytes in front of each document that `token_bytes` takes back: see `data_prep.sidecar.token_lengths`."""
        return -self.token_bytes[self.sources[0].header.tokenizer.eod]

    def weights(self) -> list[float]:
        """Fraction of the training sequences from each source; they sum to 1."""
        raw = [s.header.tokens if s.weight is None else s.weight for s in self.sources]
        return [float(w) / sum(raw) for w in raw]

    def identity(self) -> dict[str, Any]:
        """Values that are equal when two runs have read the same data: name -> `Source.record` and weight."""
        return {
            source.name: {**source.record(), "weight": float(exact_weight(weight))}
            for source, weight in zip(self.sources, self.weights(), strict=True)
        }

    def validation_identity(self) -> dict[str, Any]:
        """Name -> `Source.record` of the datasets of data.validation_prefixes."""
        return {source.name: source.record() for source in self.validation}


def cache_folder(data: DataConfig) -> Path:
    """Folder of the sample corpus and of the indices of datasets."""
    return sample.cache_folder(data.cache)


def open_corpus(data: DataConfig) -> Corpus:
    """Open the datasets of the configuration, making the sample corpus if that is what is asked for.

    Raises UserError for a missing, truncated, damaged or mismatching dataset.
    """
    if data.source == "sample":
        say(
            f"data: the sample corpus ({data.sample_text} of the installed Python's standard library)\n"
            "  | data=prefixes 'data.prefixes=[PREFIX]' trains on your own"
        )
        # Processes that ask at once wait for the first one to make it.
        prefix = sample.prepare_sample(data.cache, vocab_size=data.sample_vocabulary, source=data.sample_text)
        entries: list[Any] = [str(prefix)]
    else:
        entries = data.prefixes
    sources = tuple(_open_source(entry) for entry in entries)
    validation = tuple(_open_validation(entry) for entry in data.validation_prefixes)
    _check_blend(sources)
    _check_validation(validation, sources)
    return Corpus(sources, validation)


def open_corpus_on_all_ranks(data: DataConfig) -> Corpus:
    """`open_corpus` on every rank of the process grid; every rank calls it.

    Rank 0 makes the sample corpus and the others find it: on a filesystem without locks none could wait for another.
    """
    first = on_all_ranks(lambda: open_corpus(data) if dist.get_rank() == 0 else None)
    return on_all_ranks(lambda: first or open_corpus(data))


def _open_source(entry: Any) -> Source:
    """A source from `PREFIX` or `{path: PREFIX, weight: W}`."""
    fields = entry if isinstance(entry, dict) else {"path": entry}
    if not isinstance(fields.get("path"), str) or set(fields) - {"path", "weight"}:
        raise UserError(f"data.prefixes entry {entry} must be a prefix or {{path: PREFIX, weight: NUMBER}}.")
    weight = fields.get("weight")
    if weight is not None and not (isinstance(weight, int | float) and 0 < weight < math.inf):
        raise UserError(f"data.prefixes entry {fields['path']}: weight {weight} must be a finite number above 0.")
    prefix = os.path.abspath(dataset_prefix(fields["path"]))
    header = read_header(prefix)
    return Source(prefix, Path(prefix).name, weight, header, len(open_described(prefix, header).lengths))


def _open_validation(entry: Any) -> Source:
    """A source from a prefix."""
    if not isinstance(entry, str):
        raise UserError(f"data.validation_prefixes entry {entry} must be a prefix: each dataset is validated on alone.")
    return _open_source(entry)


def _check_validation(validation: tuple[Source, ...], sources: tuple[Source, ...]) -> None:
    """The tokenizer of the training data, distinct names, and other text."""
    trained = {source.header.files[".bin"].sha256: source for source in sources}
    for source in validation:
        if source.header.tokenizer.sha256 != sources[0].header.tokenizer.sha256:
            raise UserError(
                f"data.validation_prefixes: {source.prefix} was made with {source.header.tokenizer.file}, another "
                f"tokenizer than that of {sources[0].prefix}: tokenize it with that one."
            )
        same = trained.get(source.header.files[".bin"].sha256)
        if same is not None:
            raise UserError(
                f"data.validation_prefixes: {source.prefix} holds the tokens of {same.prefix}, which is trained on: "
                "give other text, or leave it out to validate on the documents that data.validation_fraction holds out."
            )
    _check_names(validation, "data.validation_prefixes")


def _check_blend(sources: tuple[Source, ...]) -> None:
    """One tokenizer, distinct names, and weights for all or for none."""
    first = sources[0]
    for source in sources[1:]:
        if source.header.tokenizer.sha256 != first.header.tokenizer.sha256:
            raise UserError(
                f"data.prefixes mixes tokenizers: {first.prefix} was made with {first.header.tokenizer.file} and "
                f"{source.prefix} with {source.header.tokenizer.file}; tokenize them with one tokenizer."
            )
        if (source.weight is None) != (first.weight is None):
            raise UserError("data.prefixes gives a weight to some datasets only: give one to all or to none.")
    _check_names(sources, "data.prefixes")


def _check_names(sources: tuple[Source, ...], key: str) -> None:
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"{key} holds two datasets called {twice}: their names must differ in metrics.")


class DataFiles:
    """Size and time of change of every file of a corpus, as they are when this is made.

    The data of a run must not change while it trains: the files are mapped into memory, not read once.
    """

    def __init__(self, corpus: Corpus) -> None:
        sources = (*corpus.sources, *corpus.validation)
        paths = [with_suffix(source.prefix, suffix) for source in sources for suffix in DATA_SUFFIXES]
        self.found = {path: _stamp(path) for path in paths}

    def check(self) -> None:
        """Raise UserError when a file is no longer what it was. Costs one stat per file."""
        for path, before in self.found.items():
            now = _stamp(path)
            if now != before:
                raise UserError(
                    f"{path} {_difference(before, now)} while the run reads it: what was trained since the last "
                    "checkpoint is not saved. Put the data back, then start again, or train on the new data under "
                    "another name=."
                )


def _stamp(path: Path) -> tuple[int, int] | None:
    """(bytes, time of the last change in ns), None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _difference(before: tuple[int, int] | None, now: tuple[int, int] | None) -> str:
    """Predicate of a sentence about a file that changed."""
    if now is None:
        return "has gone"
    if before is None or before[0] == now[0]:
        return "was written to"
    return f"changed from {before[0]:,} to {now[0]:,} bytes"

"""Training and validation datasets of a corpus: the last documents of each source are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from data_prep.sample import cache_remedy
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import lock_waiting, whole_folder
from sepllm_train.config.compatibility import LATEST_BLEND_ORDER
from sepllm_train.config.schema import Config
from sepllm_train.data.blend import blend_of
from sepllm_train.data.corpus import Corpus, Source, cache_folder
from sepllm_train.data.dataset import Epochs, SeparatorDataset, TokenStore
from sepllm_train.data.placement import PlacedDataset, Placement, placement_of
from sepllm_train.data.stored_rows import stored_rows
from sepllm_train.distributed.collectives import on_all_ranks


def build_datasets(
    config: Config, corpus: Corpus, *, blend_order: int = LATEST_BLEND_ORDER
) -> tuple[Dataset, dict[str, Dataset]]:
    """The endless training dataset of the blend, and by name a validation dataset for each source that holds documents
    out and each of data.validation_prefixes.

    blend_order: see `blend_of`. Rank 0 writes the index of an epoch into the cache, the others read it; every rank
    calls this. Raises UserError
    when a source is too short for the sequence length, or the cache cannot be written or is not seen by a rank.
    """
    folder = _index_folder(config, corpus)
    on_all_ranks(lambda: _write_indices(config, corpus, folder) if dist.get_rank() == 0 else None)
    return on_all_ranks(lambda: _read_datasets(config, corpus, folder, blend_order))


@dataclass(frozen=True)
class SourceSplit:
    """Training and held-out part of a source: tokens of the documents, and samples of one pass over the training
    documents."""

    training_tokens: int
    held_out_tokens: int
    training_samples: int

    @property
    def held_out_share(self) -> float:
        """Fraction of the tokens that is held out."""
        return self.held_out_tokens / (self.training_tokens + self.held_out_tokens)


def source_splits(corpus: Corpus, dataset: Any, validation: dict[str, Any]) -> list[SourceSplit]:
    """Split of each source of the corpus; `dataset` and `validation` are what `build_datasets` gave."""
    parts = [dataset] if isinstance(dataset, Epochs) else dataset.datasets
    splits = []
    for source, endless in zip(corpus.sources, parts, strict=True):
        # With data.validation_prefixes nothing of it is held out, and one of those may have its name.
        held_out = None if corpus.validation else validation.get(source.name)
        train = endless.dataset
        splits.append(SourceSplit(train.all_tokens, 0 if held_out is None else held_out.all_tokens, len(train)))
    return splits


def _write_indices(config: Config, corpus: Corpus, folder: Path) -> None:
    """Make the index folder whole or not at all, one process at a time."""
    remedy = cache_remedy(config.data.cache)
    with _locked(folder, remedy):
        if folder.exists():
            return
        with whole_folder(folder, remedy) as partial:
            for source in corpus.sources if config.data.order == "shuffled" else ():
                _source_datasets(config, source, partial)
            for source in corpus.validation:
                _whole(config, source, partial)


def _read_datasets(
    config: Config, corpus: Corpus, folder: Path, blend_order: int
) -> tuple[Dataset, dict[str, Dataset]]:
    """The datasets over an index folder that is there."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not there on every node: data.cache must be on a filesystem that all nodes see.")
    training: list[Dataset] = []
    validation: dict[str, Dataset] = {}
    placement = placement_of(config.attention, config.seed)
    for source in corpus.sources:
        train: Any
        held_out: Any
        if config.data.order == "stored":
            train, held_out = stored_rows(config, source)
            train.dataset = _placed(train.dataset, source, placement)
            training.append(train)
        else:
            train, held_out = _source_datasets(config, source, folder)
            training.append(Epochs(_placed(train, source, placement), config.seed))
        if held_out is not None:
            validation[source.name] = _placed(held_out, source, placement)
    for source in corpus.validation:
        validation[source.name] = _placed(_whole(config, source, folder), source, placement)
    return blend_of(training, corpus.weights(), blend_order), validation


def _placed(dataset: Any, source: Source, placement: Placement | None) -> Dataset:
    """The dataset with its separators where `placement` has them."""
    if placement is None:
        return dataset
    return PlacedDataset(dataset, placement, f"{source.header.files['.bin'].sha256} {dataset.index_split.name}")


def _source_datasets(config: Config, source: Source, folder: Path) -> tuple[SeparatorDataset, SeparatorDataset | None]:
    """One epoch of a source's training documents, and its held-out documents (None without validation)."""
    store = TokenStore(source.prefix)
    settings = _dataset_config(config, folder)
    first = held_out_from(store.sequence_lengths, config.data.validation_fraction, source)
    train = _split(store, source, np.arange(first), Split.train, settings)
    if first == len(store.sequence_lengths):
        return train, None
    return train, _split(store, source, np.arange(first, len(store.sequence_lengths)), Split.valid, settings)


def _whole(config: Config, source: Source, folder: Path) -> SeparatorDataset:
    """All documents of a source of data.validation_prefixes."""
    store = TokenStore(source.prefix)
    return _split(store, source, np.arange(len(store.sequence_lengths)), Split.valid, _dataset_config(config, folder))


def held_out_from(lengths: np.ndarray, fraction: float, source: Source) -> int:
    """Number of the first held-out document: the fewest last documents that hold `fraction` of the tokens.

    `lengths`: tokens of each document. Raises UserError when a single document leaves nothing to train on.
    """
    if fraction == 0:
        return len(lengths)
    if len(lengths) < 2:
        raise UserError(
            f"{source.prefix} holds one document, so none can be held out for validation: prepare it from several "
            "files or jsonl lines, or set data.validation_fraction=0."
        )
    from_end = np.cumsum(lengths[::-1], dtype=np.int64)
    documents = int(np.searchsorted(from_end, fraction * from_end[-1])) + 1
    return len(lengths) - min(documents, len(lengths) - 1)


def _split(
    store: TokenStore, source: Source, documents: np.ndarray, split: Split, settings: GPTDatasetConfig
) -> SeparatorDataset:
    """One epoch of some documents of a source."""
    tokens = int(store.sequence_lengths[documents].sum())
    if tokens < settings.sequence_length + 1:
        held_out = split is Split.valid and len(documents) < len(store.sequence_lengths)
        what = "held-out documents" if held_out else "documents" if split is Split.valid else "training documents"
        remedy = "raise data.validation_fraction, " if held_out else ""
        raise UserError(
            f"the {what} of {source.prefix} hold {tokens:,} tokens, fewer than one sequence of "
            f"data.sequence_length={settings.sequence_length} and its label: {remedy}shorten the sequence or add text."
        )
    # Named by its content, not its place: the index stays good when the data moves.
    name = " ".join(source.header.files[suffix].sha256 for suffix in (".bin", ".idx"))
    return SeparatorDataset(store, name, documents.astype(np.int32), None, split, settings)


def _dataset_config(config: Config, folder: Path) -> GPTDatasetConfig:
    """megatron-core's settings of a dataset."""
    return GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=config.data.sequence_length,
        blend=([""], None),
        split="1,0,0",
        path_to_cache=str(folder),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=config.data.mask_boundary_loss,
        create_attention_mask=False,
        tokenizer=SimpleNamespace(unique_identifiers={}, vocab_size=None, pad=-1, eod=-2),
    )


def _index_folder(config: Config, corpus: Corpus) -> Path:
    """Folder of the shuffled indices, named after everything they depend on."""
    data = config.data
    validation = corpus.validation_identity()
    key: tuple[Any, ...] = (corpus.identity(), data.validation_fraction, data.sequence_length, config.seed)
    key += (validation,) if validation else ()
    key += (data.order,) if data.order != "shuffled" else ()
    name = repr(key).encode()
    return cache_folder(data) / "index" / hashlib.sha256(name).hexdigest()[:16]


@contextmanager
def _locked(folder: Path, remedy: str) -> Iterator[None]:
    """Hold `folder`.lock, waiting for another job that does."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_name(folder.name + ".lock"), "w")  # noqa: SIM115  closed below
    except OSError as error:
        raise UserError(f"cannot write the index to {folder.parent} ({error.strerror}): {remedy}.") from None
    with lock:
        lock_waiting(lock)
        yield

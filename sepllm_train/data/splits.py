"""Training and validation datasets of a corpus: the last documents of each source are held out."""

from __future__ import annotations

import fcntl
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from sepllm_train.config.schema import Config
from sepllm_train.data.corpus import Corpus, Source, cache_folder
from sepllm_train.data.dataset import SeparatorDataset, TokenStore
from sepllm_train.errors import UserError


def build_datasets(config: Config, corpus: Corpus) -> tuple[Dataset, dict[str, Dataset]]:
    """The blended training dataset (training.steps x global_batch samples) and a validation dataset per source.

    Raises UserError when a source is too short for the sequence length.
    """
    wanted = config.training.steps * config.training.global_batch
    training: list[Dataset] = []
    validation: dict[str, Dataset] = {}
    with _index_folder(config, corpus) as folder:
        settings = _dataset_config(config, folder)
        for source, weight in zip(corpus.sources, corpus.weights(), strict=True):
            store = TokenStore(source.prefix)
            held_out = held_out_from(store.sequence_lengths, config.data.validation_fraction, source)
            # A little more than its share, since the blend draws whole samples.
            samples = math.ceil(wanted * weight * 1.005) + 1 if len(corpus.sources) > 1 else wanted
            training.append(_split(store, source, np.arange(held_out), samples, Split.train, settings))
            if config.data.validation_fraction > 0 and config.training.validation_interval > 0:
                documents = np.arange(held_out, len(store.sequence_lengths))
                validation[source.name] = _split(store, source, documents, None, Split.valid, settings)
        if len(training) == 1:
            return training[0], validation
        return _rank_zero_first(lambda: BlendedDataset(training, corpus.weights(), wanted, settings)), validation


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
    store: TokenStore,
    source: Source,
    documents: np.ndarray,
    samples: int | None,
    split: Split,
    settings: GPTDatasetConfig,
) -> SeparatorDataset:
    """The dataset over some documents of a source; `samples=None` takes every sample once."""
    tokens = int(store.sequence_lengths[documents].sum())
    if tokens < settings.sequence_length + 1:
        what = "held-out documents" if split is Split.valid else "training documents"
        remedy = "raise data.validation_fraction, " if split is Split.valid else ""
        raise UserError(
            f"the {what} of {source.prefix} hold {tokens:,} tokens, fewer than one sequence of "
            f"data.sequence_length={settings.sequence_length} and its label: {remedy}shorten the sequence or add text."
        )
    return _rank_zero_first(
        lambda: SeparatorDataset(store, source.prefix, documents.astype(np.int32), samples, split, settings)
    )


def _rank_zero_first(build: Callable[[], Any]) -> Any:
    """Build on rank 0, which writes the index files, then on the others, which read them."""
    if not dist.is_initialized():
        return build()
    result = build() if dist.get_rank() == 0 else None
    dist.barrier()
    return build() if result is None else result


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
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=SimpleNamespace(unique_identifiers={}, vocab_size=None, pad=-1, eod=-2),
    )


@contextmanager
def _index_folder(config: Config, corpus: Corpus) -> Iterator[Path]:
    """Folder of the shuffled indices, named after everything they depend on; held by one job at a time."""
    key = repr((corpus.identity(), config.data.validation_fraction)).encode()
    folder = cache_folder(config.data) / "index" / hashlib.sha256(key).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if dist.is_initialized() and dist.get_rank() != 0:
        yield folder
        return
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder

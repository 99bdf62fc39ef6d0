"""Preshuffled data: each sequence of the .idx is a sample and its label, read in stored order.

Pythia was trained so, on rows of 2,049 tokens: its step k saw rows 1,024 k to 1,024 k + 1,023. Documents end inside of
rows, with the tokenizer's token of the end.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from sepllm_train.base.errors import UserError
from sepllm_train.config.curriculum import batch_phases, batch_schedule_of, samples_of
from sepllm_train.config.schema import Config
from sepllm_train.data.corpus import Source
from sepllm_train.data.dataset import Epochs, TokenStore


class StoredRows(Dataset):
    """Rows `first` to `last` - 1 of a dataset, as samples like those of `SeparatorDataset`.

    end: id of the token that ends a document; mask_boundaries: as data.mask_boundary_loss.
    """

    def __init__(
        self, store: TokenStore, first: int, last: int, end: int, split: Split, *, mask_boundaries: bool
    ) -> None:
        self.store = store
        self.first, self.last = first, last
        self.end = end
        self.mask_boundaries = mask_boundaries
        self.index_split = split
        self.row = int(store.index.sequence_lengths[0])

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def all_tokens(self) -> int:
        """Tokens of its rows."""
        return len(self) * self.row

    def documents(self, number: int) -> tuple[str, list[int]]:
        """(prefix of the dataset, [number of the row in its .idx]) of a sample."""
        return self.store.path_prefix, [self.first + number]

    def __getitem__(self, number: int) -> dict[str, Any]:
        index, bytes_each = self.store.index, DType.size(self.store.index.dtype)
        offset = int(index.sequence_pointers[self.first + number])
        row = self.store.bin_reader.read(dtype=index.dtype, count=self.row, offset=offset)
        text = torch.from_numpy(row.astype(np.int64))
        begin = offset // bytes_each
        places = np.arange(self.row - 1, dtype=np.int32)
        begins = np.concatenate([[False], row[:-2] == self.end])
        sample = {
            "tokens": text[:-1],
            "labels": text[1:],
            "separator_class": torch.from_numpy(np.array(self.store.classes[begin : begin + self.row - 1])),
            "document_start": torch.from_numpy(np.maximum.accumulate(np.where(begins, places, 0)).astype(np.int32)),
        }
        if self.mask_boundaries:
            sample["loss_mask"] = torch.from_numpy(row[:-1] != self.end)
        return sample


class StoredOrder(Epochs):
    """Rows in stored order from row `begin` on; there is no second pass."""

    def __init__(self, dataset: StoredRows, seed: int, begin: int) -> None:
        super().__init__(dataset, seed)
        self.begin = begin

    def _place(self, number: int) -> int:
        return self.begin + number


def stored_rows(config: Config, source: Source) -> tuple[StoredOrder, StoredRows | None]:
    """Training and held-out rows of a source. A run that continues another one's schedule begins at the row of that
    step. Raises UserError for rows of another length, and for too few of them."""
    store = TokenStore(source.prefix)
    lengths, wanted = store.index.sequence_lengths, config.data.sequence_length + 1
    other = np.flatnonzero(lengths != wanted)
    if len(other):
        found = int(lengths[other[0]])
        raise UserError(
            f"{source.prefix}.idx has {found:,} tokens in row {other[0]:,}, and data.order=stored with "
            f"data.sequence_length={config.data.sequence_length} needs {wanted:,} in every row: "
            + (
                f"set data.sequence_length={found - 1}."
                if (lengths == found).all() and found > 1
                else "use data.order=shuffled, which packs documents."
            )
        )
    rows = len(lengths)
    held_out = int(np.ceil(rows * config.data.validation_fraction))
    begin = config.optim.schedule_start * config.training.global_batch
    end = begin + samples_of(batch_phases(config), config.training.steps)
    if end > rows - held_out:
        reserved = f" and {held_out:,} of them are held out" if held_out else ""
        batch = f"{'up to ' if batch_schedule_of(config) else ''}{config.training.global_batch}"
        raise UserError(
            f"training.steps={config.training.steps} of {batch} sequences need rows {begin:,} to {end - 1:,}, and "
            f"{source.prefix} has {rows:,}{reserved}: take fewer steps"
            + (", or set data.validation_fraction=0." if held_out else ".")
        )
    made = partial(StoredRows, store, end=source.header.tokenizer.eod, mask_boundaries=config.data.mask_boundary_loss)
    train = made(first=0, last=rows - held_out, split=Split.train)
    valid = made(first=rows - held_out, last=rows, split=Split.valid) if held_out else None
    return StoredOrder(train, config.seed, begin), valid

"""Datasets of a run: Megatron's GPTDataset with the separator side-car, and the endless order in which it is read.

Every sample also carries separator classes and documents. megatron-core shuffles all epochs of a run together, so that
its order depends on the number of steps and its index grows with them. Here an index covers one epoch, what is beyond
it follows from the seed, and the order is the same however long the run is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from numpy.typing import NDArray
from torch.utils.data import Dataset

from data_prep.sidecar import open_classes
from sepllm_train.base.errors import UserError

_LONGEST_DOCUMENT = 2**31 - 1


@dataclass(frozen=True)
class _Mapped:
    """A .npy file in the place of the array that is mapped from it."""

    file: str


class TokenStore(IndexedDataset):
    """The documents of a .bin/.idx pair and the separator class of each token (`classes`, u8).

    megatron-core takes each sequence of the .idx for a document; here the sequences of a document are one.
    """

    def __init__(self, prefix: str) -> None:
        super().__init__(prefix, multimodal=False, mmap=True)
        self._open()

    def __setstate__(self, state: Any) -> None:
        """megatron-core's dataset pickles its prefix alone: workers that are not forks open the classes again."""
        super().__setstate__(state)
        self._open()

    def _open(self) -> None:
        self.classes = open_classes(self.path_prefix)
        boundaries = self.index.document_indices
        self._starts: NDArray[np.int64] | None = None
        if len(boundaries) != len(self.index) + 1 or (np.diff(boundaries) != 1).any():
            ends = np.cumsum(self.index.sequence_lengths, dtype=np.int64)
            self._starts = np.concatenate([[0], ends])[boundaries]
            self._lengths = np.diff(self._starts)
            if self._lengths.max(initial=0) > _LONGEST_DOCUMENT:
                raise UserError(
                    f"{self.path_prefix}.idx has a document of {self._lengths.max():,} tokens, more than megatron-core "
                    "can index: split it."
                )
            self._lengths = self._lengths.astype(np.int32)

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, document: int) -> NDArray[np.integer]:
        return self.get(document)

    @property
    def sequence_lengths(self) -> NDArray[np.int32]:
        """Tokens of each document, by the name that megatron-core has for them."""
        return self.index.sequence_lengths if self._starts is None else self._lengths

    def get(self, document: int, offset: int = 0, length: int | None = None) -> NDArray[np.integer]:
        """`length` tokens of a document from token `offset` on; None: all that are left."""
        if self._starts is None:
            return super().get(document, offset, length)
        count = int(self._lengths[document]) - offset if length is None else length
        start = (self.first_token(document) + offset) * DType.size(self.index.dtype)
        return self.bin_reader.read(dtype=self.index.dtype, count=count, offset=start)

    def first_token(self, document: int) -> int:
        """Position of a document's first token in the file, in tokens."""
        if self._starts is not None:
            return int(self._starts[document])
        return int(self.index.sequence_pointers[document]) // DType.size(self.index.dtype)


class SeparatorDataset(GPTDataset):
    """Samples of `sequence_length` tokens, packed across documents and shuffled by megatron-core.

    A sample is a dictionary: `tokens` and `labels` i64 [S], `separator_class` u8 [S], `document_start` i32 [S]
    (position in the sequence at which the token's document starts). With data.mask_boundary_loss also `loss_mask` bool
    [S], False where the label is the first token of another document.
    """

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> TokenStore:
        """Open PREFIX.bin, PREFIX.idx and PREFIX.sep.bin."""
        return TokenStore(dataset_path)

    def __getstate__(self) -> dict[str, Any]:
        """State with the files of the mapped indices: workers that are not forks map them again, and copy nothing."""
        return {
            key: _Mapped(str(value.filename)) if isinstance(value, np.memmap) and value.filename else value
            for key, value in self.__dict__.items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what `__getstate__` returned."""
        for key, value in state.items():
            self.__dict__[key] = np.load(value.file, mmap_mode="r") if isinstance(value, _Mapped) else value

    @property
    def all_tokens(self) -> int:
        """Tokens of its documents, all of them."""
        return int(self.dataset.sequence_lengths[self.indices].sum(dtype=np.int64))

    def documents(self, idx: int) -> tuple[str, list[int]]:
        """(prefix of the dataset, numbers of the documents in its .idx) that sample `idx` is cut from."""
        sample = self.shuffle_index[idx]
        first, last = int(self.sample_index[sample][0]), int(self.sample_index[sample + 1][0])
        return self.dataset.path_prefix, [int(number) for number in self.document_index[first : last + 1]]

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        sample = self.shuffle_index[idx]
        (first, begin), (last, end) = self.sample_index[sample], self.sample_index[sample + 1]
        tokens, classes, starts, filled = [], [], [], 0
        for place in range(first, last + 1):
            document = int(self.document_index[place])
            offset = int(begin) if place == first else 0
            # The last label is the token after the last input, so a sample spans sequence_length + 1 tokens.
            stop = int(end) + 1 if place == last else int(self.dataset.sequence_lengths[document])
            position = self.dataset.first_token(document) + offset
            tokens.append(self.dataset.get(document, offset=offset, length=stop - offset))
            classes.append(self.dataset.classes[position : position + stop - offset])
            starts.append(np.full(stop - offset, filled, dtype=np.int32))
            filled += stop - offset
        text, start = torch.from_numpy(np.concatenate(tokens, dtype=np.int64)), np.concatenate(starts)
        sample = {
            "tokens": text[:-1],
            "labels": text[1:],
            "separator_class": torch.from_numpy(np.concatenate(classes)[:-1]),
            "document_start": torch.from_numpy(start[:-1]),
        }
        if self.config.eod_mask_loss:
            sample["loss_mask"] = torch.from_numpy(start[1:] != np.arange(1, len(start)))
        return sample


class Epochs(Dataset):
    """Sample n of `dataset` repeated without end; each epoch after the first is permuted by (seed, epoch)."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        # Of a later epoch; the first one is read as the dataset is ordered.
        self.epoch = 0
        self.permutation: NDArray[np.integer] | None = None

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.dataset[self._place(number)]

    def documents(self, number: int) -> tuple[str, list[int]]:
        """(prefix of the dataset, numbers of the documents) that sample `number` is cut from."""
        return self.dataset.documents(self._place(number))

    def _place(self, number: int) -> int:
        """Sample of the dataset that sample `number` of the endless order is."""
        samples = len(self.dataset)
        epoch, place = divmod(number, samples)
        if not epoch:
            return place
        if self.permutation is None or epoch != self.epoch:
            self.epoch = epoch
            # The order is the same in either type.
            self.permutation = np.arange(samples, dtype=np.int32 if samples < 2**31 else np.int64)
            np.random.default_rng((self.seed, epoch)).shuffle(self.permutation)
        return int(self.permutation[place])

"""Placement controls: as many separators as the text has, elsewhere - or fewer of them.

They answer whether it matters that separators are where the text has them. What is special is moved in the sample's
separator classes, on the host, before anything is made of them: plans, pair counts, FLOPs and the exchange of context
parallelism are of the moved separators without knowing of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from sepllm_train.config.schema import AttentionConfig
from sepllm_train.model.pattern import tiers_of_classes

Classes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Placement:
    """Move of the separators of a sequence.

    `kind` is shuffled, preceding or thinned, `special` bool [256] marks the classes that have a tier, `keep_share` is
    the probability with which a thinned separator stays, `seed` that of the run.
    """

    kind: str
    special: NDArray[np.bool_]
    keep_share: float
    seed: int

    def place(self, classes: Classes, identity: str) -> Classes:
        """The classes u8 [S] of a sequence with its separators moved; classes without a tier stay where they are.

        What chance decides depends on the seed and on `identity`, which names the sequence, and on nothing else. A
        separator that is kept at one share is kept at every larger one.
        """
        positions = np.flatnonzero(self.special[classes])
        moved, kept = classes.copy(), classes[positions]
        moved[positions] = 0
        if self.kind == "shuffled":
            positions = _shuffled(positions, uniform_draws(len(positions), self.seed, identity))
        elif self.kind == "preceding":
            kept, positions = kept[positions > 0], positions[positions > 0] - 1
        else:
            stays = uniform_draws(len(positions), self.seed, identity) < self.keep_share
            kept, positions = kept[stays], positions[stays]
        moved[positions] = kept
        return moved


def uniform_draws(count: int, seed: int, identity: str) -> NDArray[np.float64]:
    """`count` numbers in [0, 1), which depend on the seed and on `identity` alone.

    They are the same under every version of numpy: its bit generators have a fixed stream, the shuffles made from them
    do not.
    """
    digest = hashlib.sha256(f"{seed} {identity}".encode()).digest()
    bits = np.random.PCG64(int.from_bytes(digest, "little")).random_raw(count)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _shuffled(positions: NDArray[np.int64], draws: NDArray[np.float64]) -> NDArray[np.int64]:
    """Ascending positions [m] with their m - 1 gaps in the order of the draws; the first and the last one stay."""
    if len(positions) < 3:
        return positions
    gaps = np.diff(positions)[np.argsort(draws[1:], kind="stable")]
    return np.concatenate([positions[:1], positions[0] + np.cumsum(gaps)])


def placement_of(attention: AttentionConfig, seed: int) -> Placement | None:
    """The placement that the configuration asks for; None for the natural one. Raises UserError for unknown classes."""
    if attention.placement == "natural":
        return None
    _, tier_of_class = tiers_of_classes(attention)
    return Placement(attention.placement, tier_of_class > 0, attention.keep_share or 1.0, seed)


class PlacedDataset(Dataset):
    """Samples of `dataset` with their separators moved. `name` sets its samples apart from those of other datasets."""

    def __init__(self, dataset: Any, placement: Placement, name: str) -> None:
        self.dataset = dataset
        self.placement = placement
        self.name = name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        sample = self.dataset[number]
        placed = self.placement.place(sample["separator_class"].numpy(), f"{self.name} {number}")
        return {**sample, "separator_class": torch.from_numpy(placed)}

    @property
    def all_tokens(self) -> int:
        """Tokens of its documents, all of them."""
        return self.dataset.all_tokens

    def documents(self, number: int) -> tuple[str, list[int]]:
        """(prefix of the dataset, numbers of the documents) that sample `number` is cut from."""
        return self.dataset.documents(number)

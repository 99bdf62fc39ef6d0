"""Held-out samples of a run: those that validation in training takes, or of other text made with its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sepllm_train.base.errors import UserError
from sepllm_train.config.compatibility import DATA, TOKENIZER, VALIDATION_DATA, VOCABULARY, same_data
from sepllm_train.config.schema import Config, require
from sepllm_train.data.choice import check_side_cars
from sepllm_train.data.corpus import Corpus
from sepllm_train.data.splits import build_datasets
from sepllm_train.training import checkpoint as checkpoints


class TakingTurns(Dataset):
    """Sample i of k datasets is sample i // k of number i % k, up to the end of the shortest."""

    def __init__(self, datasets: Sequence[Any]) -> None:
        self.datasets = datasets

    def __len__(self) -> int:
        return len(self.datasets) * min(len(dataset) for dataset in self.datasets)

    def __getitem__(self, number: int) -> dict[str, Any]:
        place, source = divmod(number, len(self.datasets))
        return self.datasets[source][place]


class Pieces(Dataset):
    """Samples of `dataset` cut into consecutive ones of `length` tokens, which must divide theirs.

    The predicted tokens are the same; a query does not see what lies before its piece.
    """

    def __init__(self, dataset: Any, length: int) -> None:
        self.dataset = dataset
        self.length = length
        self.parts = len(dataset[0]["tokens"]) // length

    def __len__(self) -> int:
        return len(self.dataset) * self.parts

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        sample, part = divmod(number, self.parts)
        start = part * self.length
        cut = {key: value[start : start + self.length] for key, value in self.dataset[sample].items()}
        return cut | {"document_start": (cut["document_start"] - start).clamp(min=0)}


def held_out_samples(config: Config, corpus: Corpus) -> Any:
    """Held-out samples of `config.data.sequence_length` tokens, of each source in turn.

    Raises UserError when nothing is held out, or less than a sample.
    """
    sources = list(build_datasets(config, corpus)[1].values())
    require(
        bool(sources),
        "the run was trained without held-out documents (data.validation_fraction=0): name other text with --data and "
        "the share of its tokens to take with --held-out.",
    )
    return sources[0] if len(sources) == 1 else TakingTurns(sources)


def text_of(dataset: Any, samples: int) -> dict[str, Tensor]:
    """Stack the first `samples` samples: tokens, labels, separator_class, document_start [N, S]."""
    items = [dataset[number] for number in range(samples)]
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def validated_on(corpus: Corpus) -> dict[str, Any]:
    """Datasets that are validated on in place of held-out documents, if there are any, for the JSON of a result."""
    found = {source.prefix: source.header.files[".bin"].sha256 for source in corpus.validation}
    return {"validation_data": found} if found else {}


def check_data(folder: Path, config: Config, corpus: Corpus, identity: dict[str, Any], *, own: bool) -> None:
    """Raise UserError unless `corpus` has the run's tokens and holds out nothing that the run was trained on.

    identity: of the run's checkpoint. own: whether it is to be the run's own data.
    """
    names = ", ".join(source.prefix for source in corpus.sources)
    if corpus.tokenizer_sha256 != identity[TOKENIZER]:
        raise UserError(
            f"{folder} was trained on another vocabulary: {names} was made with another tokenizer than the run's data "
            f"({corpus.vocabulary:,} entries, the model has {identity[VOCABULARY]:,})."
        )
    trained = identity[DATA]
    if own and not same_data(trained, corpus.identity()):
        raise UserError(
            f"{names} is no longer the data that {folder} was trained on, so what was held out is not known: give "
            "--data PREFIX of other text."
        )
    if own and not same_data(identity.get(VALIDATION_DATA, {}), corpus.validation_identity()):
        raise UserError(
            f"data.validation_prefixes of {folder} are no longer what it was validated on: give --data PREFIX of other "
            "text and --held-out SHARE."
        )
    check_side_cars(config, corpus)
    hashes = {entry["sha256"] for entry in corpus.identity().values()}
    for seen in checkpoints.trained_on(identity):
        fraction, shared = seen["validation_fraction"], hashes & {entry["sha256"] for entry in seen["data"].values()}
        if shared and config.data.validation_fraction > fraction:
            raise UserError(
                f"--held-out {config.data.validation_fraction:g} of {names} would include documents that {folder} was "
                f"trained on: it held out {fraction:g}."
            )

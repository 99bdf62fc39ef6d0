"""Preparation of a run: data, entry into the run folder and derived numbers, before the model is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from sepllm_train.base.console import fold, say
from sepllm_train.base.errors import UserError
from sepllm_train.config.compatibility import BLEND_ORDER, EARLIER_DATA, LATEST_BLEND_ORDER
from sepllm_train.config.schema import Config
from sepllm_train.data.choice import ClassChoice, settle_separators
from sepllm_train.data.corpus import Corpus, DataFiles, open_corpus_on_all_ranks
from sepllm_train.data.splits import build_datasets, source_splits
from sepllm_train.distributed.collectives import on_all_ranks
from sepllm_train.distributed.optional import optional_packages
from sepllm_train.metrics.trackers import check_tracker
from sepllm_train.model.pattern import AUTO
from sepllm_train.training import checkpoint, run_folder
from sepllm_train.training.console_lines import start_lines
from sepllm_train.training.facts import Facts, derive
from sepllm_train.training.initial_weights import changed_positions, find_initial_weights
from sepllm_train.training.schedules import StepSchedule, schedule_of


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the model is built. `config` names the classes that separators=auto chose.

    `identity` and `schedule` are what checkpoints record of the run (see `checkpoint.identity`). `initial`: checkpoint
    of init_from; None without one, and when the run resumes from a checkpoint of its own.
    """

    config: Config
    choice: ClassChoice | None
    steps: StepSchedule
    corpus: Corpus
    files: DataFiles
    dataset: Dataset
    validation: dict[str, Dataset]
    facts: Facts
    entry: run_folder.Entry
    identity: dict[str, Any]
    schedule: dict[str, Any]
    initial: Path | None

    @property
    def recorded_identity(self) -> dict[str, Any]:
        """The identity as checkpoints and run.json record it: with the data of earlier steps if that was other, and
        the order of the blend that the run began with."""
        earlier, order = self.entry.earlier_data, self.entry.blend_order
        recorded = {**self.identity, **({EARLIER_DATA: earlier} if earlier else {})}
        return {**recorded, BLEND_ORDER: order} if BLEND_ORDER in recorded else recorded


def prepare(config: Config, world_size: int, device: torch.device) -> Prepared:
    """Open the data, check the run folder, print the derived numbers. Every rank calls it. Raises UserError."""
    on_all_ranks(lambda: check_tracker(config.logging) if dist.get_rank() == 0 else None)
    if config.attention.separators != AUTO:
        # A mistake is reported before the sample corpus is made.
        schedule_of(config)
    corpus = open_corpus_on_all_ranks(config.data)
    config, choice = settle_separators(config, corpus)
    steps = schedule_of(config)
    files = DataFiles(corpus)
    if config.model.vocabulary is not None and config.model.vocabulary < corpus.vocabulary:
        raise UserError(
            f"model.vocabulary={config.model.vocabulary} is smaller than the {corpus.vocabulary} entries of the "
            f"tokenizer of {corpus.sources[0].prefix}: raise it, or leave it null to take the tokenizer's."
        )
    vocabulary = config.model.entries(corpus.vocabulary)
    tokenizer, validated = corpus.tokenizer_sha256, corpus.validation_identity()
    identity = checkpoint.identity(config, vocabulary, corpus.identity(), tokenizer, validated)
    schedule = checkpoint.schedule_identity(config)
    entry = run_folder.settle(config, identity, schedule)
    # A run that resumes has no more need of them: they may be gone.
    initial = on_all_ranks(lambda: find_initial_weights(config, identity) if entry.checkpoint is None else None)
    dataset, validation = build_datasets(config, corpus, blend_order=entry.blend_order)
    splits = source_splits(corpus, dataset, validation)
    facts = derive(config, steps, corpus, splits, dataset, world_size, device)
    say(fold(optional_packages()))
    for line in start_lines(config, facts, world_size, device):
        say(line)
    changed = on_all_ranks(lambda: None if initial is None else changed_positions(initial, identity))
    if changed is not None:
        say(fold(changed))
    if choice is not None:
        say(fold(str(choice)))
    if BLEND_ORDER in identity and entry.blend_order != LATEST_BLEND_ORDER:
        say(fold("data: the blend keeps the order that this run began with, which meets weights to 1/65,536"))
    return Prepared(
        config, choice, steps, corpus, files, dataset, validation, facts, entry, identity, schedule, initial
    )

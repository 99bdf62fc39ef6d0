"""Preshuffled data in stored order: step k sees batch k."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from data_prep.annotate import annotate
from data_prep.sidecar import read_header
from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import Config, DataConfig, OptimConfig, TrainingConfig
from sepllm_train.data.corpus import open_corpus
from sepllm_train.data.loader import MicroBatchSampler
from sepllm_train.data.splits import build_datasets, source_splits
from sepllm_train.training.schedules import schedule_of

ROW, BATCH = 33, 4


@pytest.fixture
def alone() -> Any:
    """megatron-core asks for the rank: a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def rows(sample_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray]:
    """A preshuffled dataset of 60 rows, as GPT-NeoX has them, and its tokens [60, ROW]."""
    header = read_header(sample_prefix)
    tokens = np.fromfile(f"{sample_prefix}.bin", dtype=np.uint16)
    packed = tokens[: len(tokens) // ROW * ROW].reshape(-1, ROW)
    shuffled = np.random.default_rng(1).permutation(packed)[:60]
    prefix = str(tmp_path_factory.mktemp("rows") / "pile_shuffled")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for row in shuffled:
        builder.add_document(torch.from_numpy(row.astype(np.int32)), [len(row)])
    builder.finalize(f"{prefix}.idx")
    annotate(prefix, sample_prefix.parent / header.tokenizer.file, progress=False)
    return prefix, shuffled


@pytest.fixture
def config(rows: tuple[str, np.ndarray], tmp_path: Path) -> Config:
    """A run of ten steps over the rows, a tenth of which is held out."""
    data = DataConfig(
        source="prefixes",
        prefixes=[rows[0]],
        order="stored",
        sequence_length=ROW - 1,
        validation_fraction=0.1,
        cache=str(tmp_path),
    )
    return Config(data=data, training=TrainingConfig(steps=10, global_batch=BATCH, micro_batch=2))


def batches(config: Config, dataset: Any, first: int = 0) -> np.ndarray:
    """Tokens and last label of each sample of the steps of a run, [steps, BATCH, ROW]."""
    found = []
    for replica in range(2):
        samples = range(first * BATCH, config.training.steps * BATCH)
        sampler = MicroBatchSampler(samples, micro_batch=2, replica=replica, replicas=2)
        rows = [[dataset[number] for number in numbers] for numbers in sampler]
        found.append([[[*s["tokens"].tolist(), int(s["labels"][-1])] for s in batch] for batch in rows])
    return np.concatenate([np.array(part) for part in found], 1)


def test_step_k_sees_batch_k(alone: None, config: Config, rows: tuple[str, np.ndarray]) -> None:
    prefix, stored = rows
    dataset, validation = build_datasets(config, open_corpus(config.data))
    seen = batches(config, dataset)
    for step in range(10):
        expected = stored[step * BATCH : (step + 1) * BATCH]
        assert sorted(seen[step].tolist()) == sorted(expected.tolist())
    assert (batches(config, dataset, first=7) == seen[7:]).all()
    held_out = validation["pile_shuffled"]
    assert len(held_out) == 6 and (held_out[0]["tokens"].numpy() == stored[54, :-1]).all()
    assert dataset.documents(13) == (prefix, [13]) and held_out.documents(0) == (prefix, [54])
    (split,) = source_splits(open_corpus(config.data), dataset, validation)
    assert (split.training_tokens, split.held_out_tokens, split.training_samples) == (54 * ROW, 6 * ROW, 54)


def test_a_run_that_continues_a_schedule_begins_at_its_row(
    alone: None, config: Config, rows: tuple[str, np.ndarray]
) -> None:
    optim = OptimConfig(lr=1e-3, schedule_start=3, schedule_steps=13)
    dataset, _ = build_datasets(replace(config, optim=optim), open_corpus(config.data))
    assert [dataset.documents(number)[1] for number in (0, 39)] == [[12], [51]]
    assert (dataset[0]["tokens"].numpy() == rows[1][12, :-1]).all()


def test_a_growing_batch_reads_on_after_the_rows_before(
    alone: None, config: Config, rows: tuple[str, np.ndarray]
) -> None:
    """Four steps of 2 and eleven of 4 leave two rows of those that are not held out."""
    training = replace(config.training, steps=15, batch_schedule=[{"batch": 2, "samples": 7}])
    dataset, _ = build_datasets(replace(config, training=training), open_corpus(config.data))
    schedule = schedule_of(replace(config, training=training))
    assert [schedule.samples(step) for step in (0, 3, 4, 5, 15)] == [0, 6, 8, 12, 52]
    read = next(iter(MicroBatchSampler(range(8, 12), micro_batch=4, replica=0, replicas=1)))
    seen = [dataset[number]["tokens"].tolist() for number in read]
    assert seen == rows[1][8:12, :-1].tolist()
    more = replace(config, training=replace(training, steps=16))
    with pytest.raises(UserError, match="training.steps=16 of up to 4 sequences need rows 0 to 55, and .* has 60 and"):
        build_datasets(more, open_corpus(config.data))


def test_samples_are_those_of_packed_documents(alone: None, config: Config, rows: tuple[str, np.ndarray]) -> None:
    """Classes are the side-car's, documents begin after the token that ends one, labels are the next tokens."""
    prefix, stored = rows
    header = read_header(prefix)
    classes = np.fromfile(f"{prefix}.sep.bin", dtype=np.uint8).reshape(60, ROW)
    dataset, _ = build_datasets(config, open_corpus(config.data))
    several = 0
    for number in range(40):
        sample = dataset[number]
        assert [sample[key].dtype for key in sample] == [torch.int64, torch.int64, torch.uint8, torch.int32]
        assert (sample["labels"].numpy() == stored[number, 1:]).all()
        assert (sample["separator_class"].numpy() == classes[number, :-1]).all()
        start, expected = 0, []
        for place, token in enumerate(stored[number, :-1]):
            expected.append(start)
            start = place + 1 if token == header.tokenizer.eod else start
        assert sample["document_start"].tolist() == expected
        several += max(expected) > 0
    assert several
    masking = replace(config, data=replace(config.data, mask_boundary_loss=True))
    for dataset, _ in (build_datasets(masking, open_corpus(masking.data)),):
        masks = torch.stack([dataset[number]["loss_mask"] for number in range(40)])
    assert (masks.numpy() == (stored[:40, :-1] != header.tokenizer.eod)).all() and not masks.all()


MISTAKES: dict[str, tuple[Callable[[Config], Config], str]] = {
    "length": (
        lambda config: replace(config, data=replace(config.data, sequence_length=64)),
        r"has 33 tokens in row 0, and data.order=stored with data.sequence_length=64 needs 65 in every row: set "
        r"data.sequence_length=32\.",
    ),
    "steps": (
        lambda config: replace(config, training=replace(config.training, steps=14)),
        r"training.steps=14 of 4 sequences need rows 0 to 55, and .* has 60 and 6 of them are held out: take fewer "
        r"steps, or set data.validation_fraction=0\.",
    ),
    "start": (
        lambda config: replace(config, optim=OptimConfig(lr=1e-3, schedule_start=12)),
        "need rows 48 to 87",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_rows_that_do_not_fit_are_refused(alone: None, config: Config, mistake: str) -> None:
    change, words = MISTAKES[mistake]
    config = change(config)
    with pytest.raises(UserError, match=words):
        build_datasets(config, open_corpus(config.data))


def test_other_settings_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"data\.order=stored reads the rows of one dataset, and data\.prefixes has 0"):
        DataConfig(order="stored")
    with pytest.raises(UserError, match=r"data\.order=random is unknown: choose one of shuffled, stored"):
        DataConfig(order="random")


def test_a_run_in_stored_order(trained_on: Callable[..., Any], rows: tuple[str, np.ndarray]) -> None:
    """Of the launcher's program: two steps, then from the first one on again, and not in another order."""
    whole = trained_on("stored")
    assert whole["losses"] == trained_on("stored", resume_from=1)["losses"]
    assert "data.order=stored, this run has shuffled" in trained_on("shuffled", resume_from=1)["sentence"]


@pytest.fixture
def trained_on(rows: tuple[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Trains two steps on the rows; gives the losses, or the sentence in which the run was refused."""
    from sepllm_train.cli.main import main
    from tests.support.small_run import SMALL_MODEL

    settings = [
        *(
            "+experiment=demo_sep",
            *SMALL_MODEL,
            "data=prefixes",
            f"data.prefixes=[{rows[0]}]",
            f"data.cache={tmp_path}",
        ),
        *(
            f"data.sequence_length={ROW - 1}",
            "training.steps=2",
            "training.checkpoint_interval=1",
            "logging.interval=1",
        ),
        *("training.validation_interval=0", "training.validation_samples=2", f"run_root={tmp_path}"),
    ]

    def train(order: str, resume_from: int | None = None) -> dict[str, Any]:
        name = order if resume_from is None else f"{order}_again"
        words = ["pretrain", *settings, f"data.order={order}", f"name={name}"]
        if resume_from is not None:
            words.append(f"resume={tmp_path}/stored/checkpoints/step_{resume_from:08d}")
        capsys.readouterr()
        if main(words) != 0:
            return {"sentence": capsys.readouterr().err}
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses = {line["step"]: line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line}
        return {"losses": losses[2]}

    return train

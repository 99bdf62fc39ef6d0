"""Samples: tokens, labels, separator classes and documents stay aligned; splits and blends are what was asked for."""

from __future__ import annotations

import math
import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data_prep.separators import classify
from data_prep.sidecar import read_header
from data_prep.tokenizers import load_tokenizer
from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import Config, DataConfig, TrainingConfig
from sepllm_train.data.blend import PeriodicBlend
from sepllm_train.data.corpus import open_corpus
from sepllm_train.data.dataset import TokenStore
from sepllm_train.data.loader import MaskedDataset, MicroBatchSampler, PaddedSampler, micro_batches
from sepllm_train.data.splits import SourceSplit, build_datasets, held_out_from, source_splits


@pytest.fixture(autouse=True)
def alone() -> Any:
    """megatron-core asks for the rank: a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config_for(entries: list[Any], cache: Path, *, length: int = 64, steps: int = 20, fraction: float = 0.1) -> Config:
    """A run over `entries` of data.prefixes."""
    return Config(
        data=DataConfig(
            source="prefixes",
            prefixes=entries,
            sequence_length=length,
            validation_fraction=fraction,
            cache=str(cache),
        ),
        training=TrainingConfig(steps=steps, global_batch=4, micro_batch=2),
    )


def test_samples_are_aligned(prefixes: tuple[str, str], tmp_path: Path) -> None:
    config = config_for([prefixes[0]], tmp_path)
    dataset, _ = build_datasets(config, open_corpus(config.data))
    header = read_header(prefixes[0])
    tokenizer = load_tokenizer(Path(prefixes[0]).parent / header.tokenizer.file)
    class_of = torch.from_numpy(classify(tokenizer.token_bytes()))
    crossing = 0
    for number in range(80):
        sample = dataset[number]
        tokens, starts = sample["tokens"], sample["document_start"]
        assert tokens.shape == sample["labels"].shape == starts.shape == (64,)
        assert torch.equal(tokens[1:], sample["labels"][:-1])
        assert torch.equal(sample["separator_class"], class_of[tokens])
        after_end = torch.cat((torch.tensor([0]), (tokens[:-1] == header.tokenizer.eod).nonzero().flatten() + 1))
        expected = torch.zeros(64, dtype=torch.int32)
        for start in after_end:
            expected[start:] = start
        assert torch.equal(starts, expected)
        crossing += len(after_end) > 1
    assert crossing >= 3


def test_labels_of_other_documents_are_masked(prefixes: tuple[str, str], tmp_path: Path) -> None:
    """Those after a token that ends a document, also the last of a sample; all else is as without the mask."""
    config = config_for([prefixes[0]], tmp_path, length=8)
    plain, _ = build_datasets(config, open_corpus(config.data))
    config = replace(config, data=replace(config.data, mask_boundary_loss=True))
    dataset, validation = build_datasets(config, open_corpus(config.data))
    end = read_header(prefixes[0]).tokenizer.eod
    last = 0
    for number in range(len(plain.dataset)):
        sample, without = dataset[number], plain[number]
        assert all(torch.equal(sample[key], without[key]) for key in without) and "loss_mask" not in without
        assert torch.equal(sample["loss_mask"], sample["tokens"] != end)
        last += not sample["loss_mask"][-1]
    assert last
    assert "loss_mask" in next(iter(validation.values()))[0]


def test_every_training_token_is_read_once_an_epoch(prefixes: tuple[str, str], tmp_path: Path) -> None:
    store = TokenStore(prefixes[0])
    held = held_out_from(store.sequence_lengths, 0.1, open_corpus(config_for([prefixes[0]], tmp_path).data).sources[0])
    tokens = int(store.sequence_lengths[:held].sum())
    config = config_for([prefixes[0]], tmp_path, steps=(tokens - 1) // 64 // 4)
    dataset, validation = build_datasets(config, open_corpus(config.data))
    samples = len(dataset.dataset)
    (split,) = source_splits(open_corpus(config.data), dataset, validation)
    assert split == SourceSplit(tokens, int(store.sequence_lengths[held:].sum()), samples)
    seen = np.bincount(np.concatenate([dataset[n]["tokens"].numpy() for n in range(samples)]), minlength=4096)
    there = np.bincount(np.concatenate([store[d] for d in range(held)]), minlength=4096)
    assert (seen <= there).all() and there.sum() - seen.sum() <= 64 + 1
    again = np.bincount(
        np.concatenate([dataset[samples + n]["tokens"].numpy() for n in range(samples)]), minlength=4096
    )
    assert np.array_equal(seen, again)
    assert not all(torch.equal(dataset[n]["tokens"], dataset[samples + n]["tokens"]) for n in range(samples))
    held_out = set(np.concatenate([store[d] for d in range(held, len(store))]).tolist())
    sample = next(iter(validation.values()))[0]
    assert set(sample["tokens"].tolist()) <= held_out


def test_blend_follows_the_weights(prefixes: tuple[str, str], tmp_path: Path) -> None:
    config = config_for([{"path": prefixes[0], "weight": 3}, {"path": prefixes[1], "weight": 1}], tmp_path, steps=100)
    dataset, validation = build_datasets(config, open_corpus(config.data))
    splits = source_splits(open_corpus(config.data), dataset, validation)
    assert [split.training_samples for split in splits] == [len(source.dataset) for source in dataset.datasets]
    alone = [build_datasets(c, open_corpus(c.data))[0] for c in (config_for([p], tmp_path) for p in prefixes)]
    taken = [0, 0]
    for number in range(400):
        source = int(not torch.equal(dataset[number]["tokens"], alone[0][taken[0]]["tokens"]))
        assert torch.equal(dataset[number]["tokens"], alone[source][taken[source]]["tokens"])
        taken[source] += 1
    assert abs(taken[0] - 300) <= 1
    assert sorted(validation) == ["notes", "prose"]


def test_blend_goes_on_where_each_source_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepllm_train.data.blend.PERIOD", 16)
    sources: Any = [[{"n": (name, n)} for n in range(100)] for name in "ab"]
    blend = PeriodicBlend(sources, [0.75, 0.25])
    read = [blend[number]["n"] for number in range(48)]
    for name, count in (("a", 36), ("b", 12)):
        assert [n for source, n in read if source == name] == list(range(count))


def test_order_does_not_depend_on_the_number_of_steps(prefixes: tuple[str, str], tmp_path: Path) -> None:
    short, long = (
        build_datasets(c, open_corpus(c.data))[0]
        for c in (config_for([prefixes[0]], tmp_path, steps=steps) for steps in (10, 100_000))
    )
    assert all(torch.equal(short[n]["tokens"], long[n]["tokens"]) for n in range(0, 3000, 100))


@pytest.mark.usefixtures("without_locks")
def test_index_is_made_on_a_filesystem_without_locks(
    prefixes: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for([prefixes[0]], tmp_path)
    assert len(build_datasets(config, open_corpus(config.data))[0][0]["tokens"]) == 64
    assert capsys.readouterr().err.count("warning: files cannot be locked on this filesystem") == 1


def test_interrupted_index_is_made_again(prefixes: tuple[str, str], tmp_path: Path) -> None:
    config = config_for([prefixes[0]], tmp_path)
    before = build_datasets(config, open_corpus(config.data))[0][3]["tokens"]
    (folder,) = (path for path in (tmp_path / "index").iterdir() if path.is_dir())
    folder.rename(f"{folder}.partial")
    next(Path(f"{folder}.partial").glob("*shuffle_index.npy")).write_bytes(b"torn")
    assert torch.equal(build_datasets(config, open_corpus(config.data))[0][3]["tokens"], before)


def test_same_seed_same_order_other_seed_other_order(prefixes: tuple[str, str], tmp_path: Path) -> None:
    def first(seed: int, cache: Path) -> list[torch.Tensor]:
        config = config_for([prefixes[0]], cache)
        config.seed = seed
        dataset, _ = build_datasets(config, open_corpus(config.data))
        return [dataset[n]["tokens"] for n in range(10)]

    one = first(1, tmp_path / "a")
    assert all(torch.equal(x, y) for x, y in zip(one, first(1, tmp_path / "b"), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(one, first(2, tmp_path / "a"), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_layout_and_workers_do_not_change_what_a_step_reads(
    prefixes: tuple[str, str], tmp_path: Path, workers: int
) -> None:
    config = config_for([prefixes[0]], tmp_path)
    dataset, _ = build_datasets(config, open_corpus(config.data))

    def step(replicas: int, micro_batch: int, first: int) -> torch.Tensor:
        rows = []
        for replica in range(replicas):
            sampler = MicroBatchSampler(
                range(4 * first, 4 * 5), micro_batch=micro_batch, replica=replica, replicas=replicas
            )
            batches = list(micro_batches(dataset, sampler, workers=workers, device=torch.device("cpu")))
            assert len(batches) == len(sampler)
            rows += [row for batch in batches[: 4 // (micro_batch * replicas)] for row in batch["tokens"].tolist()]
        return torch.tensor(sorted(rows))

    assert torch.equal(step(1, 4, 3), step(2, 1, 3))
    assert torch.equal(step(1, 2, 3), step(2, 2, 3))
    assert not torch.equal(step(1, 2, 3), step(1, 2, 2))


def test_filling_of_the_last_validation_batch_is_not_counted() -> None:
    batches = [list(PaddedSampler(5, micro_batch=2, replica=r, replicas=2)) for r in range(2)]
    assert batches == [[[0, 1], [4, -1]], [[2, 3], [-1, -1]]]
    masked = MaskedDataset([{"tokens": torch.tensor([n])} for n in range(5)])  # type: ignore[arg-type]
    assert [masked[n]["counted"].item() for n in (4, -1)] == [1.0, 0.0]
    assert len(PaddedSampler(5, micro_batch=1, replica=0, replicas=1, multiple=4)) == 8


def test_held_out_documents_hold_the_fraction() -> None:
    lengths = np.array([100, 100, 100, 100, 10, 10, 10], dtype=np.int32)
    source: Any = None
    assert held_out_from(lengths, 0.0, source) == 7
    assert held_out_from(lengths, 0.02, source) == 6
    assert held_out_from(lengths, 0.05, source) == 4
    assert held_out_from(lengths, 0.99, source) == 1


def test_mistakes(prefixes: tuple[str, str], tmp_path: Path) -> None:
    def fails(entries: list[Any], words: str, **options: Any) -> None:
        with pytest.raises(UserError, match=words):
            config = config_for(entries, tmp_path, **options)
            build_datasets(config, open_corpus(config.data))

    one, two = prefixes
    fails([str(tmp_path / "none")], "no dataset at .*none")
    fails([one], "hold [0-9,]+ tokens, fewer than one sequence of data.sequence_length=900000", length=900000)
    fails([{"path": one, "weight": 1}, two], "a weight to some datasets only")
    fails([{"path": one, "weight": -1}], "weight -1 must be a finite number above 0")
    fails([{"path": one, "weight": math.inf}], "weight inf must be a finite number above 0")
    fails([{"paths": one}], "must be a prefix or")
    fails([one, one], "two datasets called prose")


def test_datasets_of_their_own_are_validated_on(prefixes: tuple[str, str], tmp_path: Path) -> None:
    """The training dataset keeps all of its documents; the other one is read whole, and is told of by its name."""
    one, two = prefixes
    config = config_for([one], tmp_path, fraction=0.02)
    config = replace(config, data=replace(config.data, validation_prefixes=[two]))
    assert config.data.validation_fraction == 0
    corpus = open_corpus(config.data)
    dataset, validation = build_datasets(config, corpus)
    (split,) = source_splits(corpus, dataset, validation)
    assert (split.training_tokens, split.held_out_tokens) == (read_header(one).tokens, 0)
    assert list(validation) == ["notes"] and validation["notes"].all_tokens == read_header(two).tokens
    assert validation["notes"].documents(0)[0] == two
    # Another set is another index.
    plain = config_for([one], tmp_path, fraction=0.0)
    assert not build_datasets(plain, open_corpus(plain.data))[1]

    def fails(entries: list[Any], words: str) -> None:
        with pytest.raises(UserError, match=words):
            data = replace(config.data, validation_prefixes=entries)
            build_datasets(replace(config, data=data), open_corpus(data))

    fails([one], "prose holds the tokens of .*prose, which is trained on")
    fails([two, two], "data.validation_prefixes holds two datasets called notes")
    fails([{"path": two, "weight": 1}], "must be a prefix: each dataset is validated on alone")
    fails([str(tmp_path / "none")], "no dataset at .*none")


def test_truncated_file_is_found_before_training(prefixes: tuple[str, str], tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".sep.bin", ".sep.json"):
        (tmp_path / f"cut{suffix}").write_bytes(Path(prefixes[0] + suffix).read_bytes())
    whole = (tmp_path / "cut.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"cut\.bin has .* bytes"):
        open_corpus(config_for([str(tmp_path / "cut")], tmp_path).data)
    (tmp_path / "cut.bin").unlink()
    with pytest.raises(UserError, match=r"cut\.bin is missing"):
        open_corpus(config_for([str(tmp_path / "cut")], tmp_path).data)


def test_one_document_cannot_be_split(prefixes: tuple[str, str], tmp_path: Path) -> None:
    corpus = open_corpus(config_for([prefixes[0]], tmp_path).data)
    with pytest.raises(UserError, match="holds one document.*data.validation_fraction=0"):
        held_out_from(np.array([5000], dtype=np.int32), 0.1, corpus.sources[0])


def test_a_dataset_travels_without_its_indices(prefixes: tuple[str, str], tmp_path: Path) -> None:
    config = config_for([prefixes[0]], tmp_path)
    dataset, _ = build_datasets(config, open_corpus(config.data))
    index = dataset.dataset.shuffle_index
    travelled = pickle.loads(pickle.dumps(dataset))
    again = travelled.dataset.shuffle_index
    assert isinstance(index, np.memmap) and isinstance(again, np.memmap) and again.filename == index.filename
    # Its tokens and classes are mapped again too: what is pickled does not grow with the text.
    assert len(pickle.dumps(dataset)) < min(Path(prefixes[0] + ".bin").stat().st_size, 20_000)
    assert all(torch.equal(travelled[7][key], value) for key, value in dataset[7].items())


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(m, marks=pytest.mark.slow) for m in ("spawn", "forkserver"))]
)
def test_samples_do_not_depend_on_how_workers_start(prefixes: tuple[str, str], tmp_path: Path, method: str) -> None:
    config = config_for(list(prefixes), tmp_path)
    dataset, _ = build_datasets(config, open_corpus(config.data))
    sampler = MicroBatchSampler(range(3 * 4), micro_batch=2, replica=0, replicas=1)
    expected = list(micro_batches(dataset, sampler, workers=0, device=torch.device("cpu")))
    usual = multiprocessing.get_start_method(allow_none=True)
    # The default of Python 3.14 on Linux is forkserver, and of macOS spawn.
    multiprocessing.set_start_method(method, force=True)
    try:
        found = list(micro_batches(dataset, sampler, workers=2, device=torch.device("cpu")))
    finally:
        multiprocessing.set_start_method(usual, force=True)
    assert len(found) == len(expected) == 6
    for batch, wanted in zip(found, expected, strict=True):
        assert batch.keys() == wanted.keys() and all(torch.equal(batch[key], wanted[key]) for key in wanted)

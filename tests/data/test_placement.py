"""Placement controls: what is kept of the natural separators, and that chance depends on seed and sample alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from sepllm_train.analysis.match import matching_keep_share, mean_keys
from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import AttentionConfig, Config, DataConfig, TrainingConfig
from sepllm_train.data.corpus import open_corpus
from sepllm_train.data.dataset import SeparatorDataset
from sepllm_train.data.loader import MaskedDataset, MicroBatchSampler, micro_batches
from sepllm_train.data.placement import Placement, placement_of, uniform_draws
from sepllm_train.data.splits import build_datasets
from sepllm_train.model.pattern import resolve_pattern
from sepllm_train.training.facts import sample_plan

CONTROLS = ("shuffled", "preceding", "thinned")
# Classes up to 5 have a tier in the property tests, those above have none.
SPECIAL = np.arange(256) % 256 <= 5
SPECIAL[0] = False
sequences = st.lists(st.sampled_from([0, 0, 0, 0, 1, 2, 3, 5, 7, 14]), min_size=1, max_size=80).map(
    lambda values: np.array(values, dtype=np.uint8)
)
seeds = st.integers(0, 2**40)


def place(kind: str, classes: np.ndarray, seed: int = 1, identity: str = "a 0", share: float = 1.0) -> np.ndarray:
    """The classes with SPECIAL ones moved; what was given is not written to."""
    before = classes.copy()
    moved = Placement(kind, SPECIAL, share, seed).place(classes, identity)
    assert np.array_equal(classes, before) and moved.dtype == np.uint8 and moved.shape == classes.shape
    return moved


def separators(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the special tokens, and their classes."""
    positions = np.flatnonzero(SPECIAL[classes])
    return positions, classes[positions]


@given(sequences, seeds)
def test_shuffling_keeps_count_gaps_and_order_of_classes(classes: np.ndarray, seed: int) -> None:
    positions, kinds = separators(classes)
    moved, moved_kinds = separators(place("shuffled", classes, seed))
    assert np.array_equal(kinds, moved_kinds)
    assert sorted(np.diff(positions)) == sorted(np.diff(moved))
    assert positions[:1].tolist() == moved[:1].tolist() and positions[-1:].tolist() == moved[-1:].tolist()


@given(sequences)
def test_preceding_moves_every_separator_but_one_at_the_start(classes: np.ndarray) -> None:
    positions, kinds = separators(classes)
    moved, moved_kinds = separators(place("preceding", classes))
    assert moved.tolist() == [p - 1 for p in positions if p > 0]
    assert moved_kinds.tolist() == kinds[positions > 0].tolist()


@given(sequences, seeds, st.floats(0.01, 1), st.floats(0.01, 1))
def test_thinning_keeps_some_in_place_and_more_at_a_larger_share(
    classes: np.ndarray, seed: int, one: float, other: float
) -> None:
    few, many = (place("thinned", classes, seed, share=share) for share in sorted((one, other)))
    for fewer, more in ((few, many), (many, classes)):
        kept = np.flatnonzero(SPECIAL[fewer])
        assert np.array_equal(fewer[kept], more[kept])
        assert np.array_equal(fewer[~SPECIAL[more]], more[~SPECIAL[more]])
    assert np.array_equal(place("thinned", classes, seed, share=1.0), classes)


@given(sequences, st.sampled_from(CONTROLS))
def test_classes_without_a_tier_never_get_one_and_none_is_made_up(classes: np.ndarray, kind: str) -> None:
    moved = place(kind, classes, share=0.5)
    ordinary = ~SPECIAL[classes] & ~SPECIAL[moved]
    assert np.array_equal(moved[ordinary], classes[ordinary])
    assert not Counter(moved[SPECIAL[moved]].tolist()) - Counter(classes[SPECIAL[classes]].tolist())


def test_a_run_of_separators_moves_as_one() -> None:
    assert place("preceding", np.array([0, 0, 1, 2, 3, 0], dtype=np.uint8)).tolist() == [0, 1, 2, 3, 0, 0]
    assert place("preceding", np.array([1, 2, 0, 0, 5], dtype=np.uint8)).tolist() == [2, 0, 0, 5, 0]


def test_chance_is_seed_and_identity_alone() -> None:
    classes = (np.arange(4000) % 7 == 0).astype(np.uint8)
    one = place("thinned", classes, 1, "a 0", 0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        states = np.random.get_state()[1].copy(), torch.random.get_rng_state()
        assert np.array_equal(place("thinned", classes, 1, "a 0", 0.5), one)
        assert np.array_equal(np.random.get_state()[1], states[0])
        assert torch.equal(torch.random.get_rng_state(), states[1])
    assert not np.array_equal(place("thinned", classes, 2, "a 0", 0.5), one)
    assert not np.array_equal(place("thinned", classes, 1, "a 1", 0.5), one)
    assert abs(one.sum() / classes.sum() - 0.5) < 0.07


def test_draws_do_not_change_with_numpy() -> None:
    draws = uniform_draws(3, 1234, "train 0")
    assert draws.tolist() == [0.2090046513904873, 0.99971857905199, 0.4343566377679541]


def test_natural_places_nothing() -> None:
    assert placement_of(AttentionConfig(), 1) is None
    assert placement_of(AttentionConfig(pattern="dense"), 1) is None
    tiers = [{"classes": ["comma"], "horizon": 9}, {"classes": ["newline"], "horizon": "forever"}]
    placement = placement_of(AttentionConfig(separators=tiers, placement="shuffled"), 1)
    assert placement is not None and np.flatnonzero(placement.special).tolist() == [2, 9]


@pytest.fixture
def alone() -> Any:
    """megatron-core asks for the rank: a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def datasets(entries: list[Any], cache: Path, **attention: Any) -> tuple[Any, Any]:
    """Training and validation datasets of a run over `entries`."""
    config = Config(
        data=DataConfig(
            source="prefixes", prefixes=entries, sequence_length=128, validation_fraction=0.1, cache=str(cache)
        ),
        training=TrainingConfig(steps=20, global_batch=4, micro_batch=2),
        attention=AttentionConfig(**attention),
    )
    return build_datasets(config, open_corpus(config.data))


@pytest.mark.usefixtures("alone")
def test_natural_is_the_dataset_itself(prefixes: tuple[str, str], tmp_path: Path) -> None:
    training, validation = datasets([prefixes[0]], tmp_path, placement="natural")
    assert type(training.dataset) is SeparatorDataset
    assert all(type(dataset) is SeparatorDataset for dataset in validation.values())
    whole, _ = datasets([prefixes[0]], tmp_path, placement="thinned", keep_share=1.0)
    for number in range(40):
        natural, kept = training[number], whole[number]
        assert natural.keys() == kept.keys()
        assert all(torch.equal(natural[key], kept[key]) for key in natural)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", CONTROLS)
def test_samples_differ_in_separators_alone(prefixes: tuple[str, str], tmp_path: Path, kind: str) -> None:
    share = 0.5 if kind == "thinned" else None
    pairs = [
        datasets(list(prefixes), tmp_path, placement=p, keep_share=s) for p, s in (("natural", None), (kind, share))
    ]
    (natural, natural_validation), (placed, placed_validation) = pairs
    pattern = resolve_pattern(AttentionConfig(placement=kind, keep_share=share, initial_tokens=0), 1)
    compared = [(natural, placed)] + [(natural_validation[name], placed_validation[name]) for name in placed_validation]
    different = 0
    for before, after in compared:
        for number in range(min(len(before), 10) if before is not natural else 40):
            one, other = before[number], after[number]
            assert all(torch.equal(one[key], other[key]) for key in ("tokens", "labels", "document_start"))
            counts = [int(sample_plan(pattern, sample).prefix[0, 0, -1]) for sample in (one, other)]
            lost = int(pattern.tier_of_class[one["separator_class"][0]] > 0) if kind == "preceding" else 0
            assert counts[1] == counts[0] - lost if kind != "thinned" else counts[1] <= counts[0]
            different += not torch.equal(one["separator_class"], other["separator_class"])
            assert before.documents(number) == after.documents(number)
    assert different > 30


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", ["shuffled", "thinned"])
def test_workers_layouts_epochs_and_resumption_see_the_same(
    prefixes: tuple[str, str], tmp_path: Path, kind: str
) -> None:
    share = 0.5 if kind == "thinned" else None

    def read(first: int, replicas: int, workers: int) -> list[list[int]]:
        """Tokens and classes of every sample of steps `first` to 4, sorted."""
        dataset, _ = datasets([prefixes[0]], tmp_path, placement=kind, keep_share=share)
        rows = []
        for replica in range(replicas):
            sampler = MicroBatchSampler(range(4 * first, 4 * 5), micro_batch=2, replica=replica, replicas=replicas)
            for batch in micro_batches(dataset, sampler, workers=workers, device=torch.device("cpu")):
                rows += torch.cat((batch["tokens"], batch["separator_class"].long()), dim=1).tolist()
        return sorted(rows)

    whole = read(0, 1, 0)
    assert read(0, 2, 0) == whole == read(0, 2, 2)
    later = read(3, 2, 0)
    assert len(later) == 8 and all(row in whole for row in later)

    dataset, validation = datasets([prefixes[0]], tmp_path, placement=kind, keep_share=share)
    samples = len(dataset.dataset)
    first = {tuple(dataset[n]["tokens"].tolist()): dataset[n]["separator_class"] for n in range(samples)}
    for number in range(samples, 2 * samples, 7):
        again = dataset[number]
        assert torch.equal(first[tuple(again["tokens"].tolist())], again["separator_class"])
    held_out = next(iter(validation.values()))
    assert torch.equal(MaskedDataset(held_out)[1]["separator_class"], held_out[1]["separator_class"])


@pytest.mark.usefixtures("alone")
def test_thinning_matches_the_keys_of_horizons(prefixes: tuple[str, str], tmp_path: Path) -> None:
    tiers = [{"classes": ["comma", "clause_mixed"], "horizon": 20}, {"classes": ["period", "newline"], "horizon": 64}]
    attention = AttentionConfig(separators=tiers, window=[4, 8])
    natural, _ = datasets([prefixes[0]], tmp_path)
    samples = [natural[number] for number in range(100)]
    found = matching_keep_share(attention, 2, samples)
    assert 0 < found.share < 1 and found.neighbours < found.horizons < found.forever
    assert found.horizons == mean_keys(attention, 2, samples)
    names = found.attention.separators
    thinned, _ = datasets(
        [prefixes[0]], tmp_path, placement="thinned", keep_share=found.share, separators=names, window=[4, 8]
    )
    measured = mean_keys(found.attention, 2, [thinned[number] for number in range(100)])
    assert measured == pytest.approx(found.horizons, rel=0.03)
    all_for_ever = AttentionConfig(window=[4, 8])
    assert matching_keep_share(all_for_ever, 2, samples).share == 1


def test_what_no_share_matches() -> None:
    sample = {"separator_class": torch.zeros(16, dtype=torch.uint8), "document_start": torch.zeros(16)}
    with pytest.raises(UserError, match="no separator is visible beyond the window.*attention=streaming"):
        matching_keep_share(AttentionConfig(), 1, [sample])
    with pytest.raises(UserError, match="attention.placement=natural, not to sep and shuffled"):
        matching_keep_share(AttentionConfig(placement="shuffled"), 1, [sample])
    with pytest.raises(UserError, match="not to dense and natural"):
        matching_keep_share(AttentionConfig(pattern="dense"), 1, [sample])

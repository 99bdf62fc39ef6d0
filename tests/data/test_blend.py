"""Blends: every source has its share to one sample, at any length, from any sample on, without a table."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.config.schema import DataConfig
from sepllm_train.data.blend import Blend, PeriodicBlend, blend_of
from sepllm_train.data.corpus import open_corpus


def counts(blend: Any, samples: int, sources: int) -> list[int]:
    """Samples of each source among the first `samples`, from the order itself: what comes next of each is its count."""
    found = [0] * sources
    missing, number = set(range(sources)), samples
    while missing and number < samples + 4_000_000:
        source, place = blend.place(number)
        if source in missing:
            missing.discard(source)
            found[source] = place
        number += 1
    assert not missing
    return found


@pytest.mark.parametrize(
    "weights", [[1 - 1e-6, 1e-6], [0.7, 0.3 - 1e-6, 1e-6], [1e-6, 0.25, 0.5, 0.25 - 1e-6], [2 / 3, 1 / 3]]
)
def test_a_small_weight_has_its_share_to_one_sample(weights: list[float]) -> None:
    blend = Blend([None] * len(weights), weights)
    for samples in (1, 1000, 65_536, 10**6, 99_999_999, 10**8, 10**12):
        for count, weight in zip(counts(blend, samples, len(weights)), weights, strict=True):
            assert abs(count - weight * samples) <= 1 + 1e-12 * samples, (samples, weight, count)


def test_any_weights_at_any_length() -> None:
    """Up to four sources stay within a sample of their share all the time, more within two."""
    draw = random.Random(0)
    for _ in range(60):
        raw = [10 ** draw.uniform(-3, 0) for _ in range(draw.randint(2, 9))]
        weights = [value / sum(raw) for value in raw]
        blend, taken = Blend([None] * len(raw), weights), [0] * len(raw)
        for number in range(2000):
            source, place = blend.place(number)
            assert place == taken[source]
            taken[source] += 1
            most = 1 if len(raw) <= 4 else 2
            assert all(abs(t - w * (number + 1)) <= most for t, w in zip(taken, weights, strict=True))


def test_the_order_needs_no_table_that_grows() -> None:
    blend = Blend([None, None], [0.999999, 1e-6])
    assert blend.place(10**15)[1] > 9 * 10**14
    assert sys.getsizeof(blend.tree) < 1000 and set(vars(blend)) == {"datasets", "tree"}


def test_runs_that_began_before_keep_their_order() -> None:
    """The order that checkpoints of before stand for, as it was."""
    sources: list[Any] = [[]] * 3
    old = blend_of(sources, [0.5, 0.3, 0.2], 1)
    assert isinstance(old, PeriodicBlend)
    assert [old.place(n) for n in (0, 1, 2, 3, 4, 5, 65_536, 65_537)] == [
        (0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (0, 2), (0, 32_768), (1, 19_661),
    ]  # fmt: skip
    assert isinstance(blend_of(sources, [0.5, 0.3, 0.2]), Blend)


def test_small_weights_are_told_apart(prefixes: tuple[str, str], tmp_path: Path) -> None:
    """Checkpoints record weights as the order takes them: not in millionths."""

    def recorded(*weights: float) -> list[float]:
        entries: Any = [{"path": path, "weight": weight} for path, weight in zip(prefixes, weights, strict=True)]
        corpus = open_corpus(DataConfig(source="prefixes", prefixes=entries, cache=str(tmp_path)))
        return [entry["weight"] for entry in corpus.identity().values()]

    assert recorded(1, 4e-7) != recorded(1, 1e-7)
    assert recorded(1, 2) == recorded(0.1, 0.2) == recorded(10, 20)

"""Every layout of processes trains the same model: same losses and gradient norms as one process.

Weights come from the seed alone, without a checkpoint, so this also holds the initialisation to being the same in
every layout. The dense and the separator pattern have different losses, so it shows too that the separators reach
the layers of each rank and stage.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from tests.distributed_runner import run_ranks
from tests.model.layout_worker import train_all

# Layouts of one entry share a process grid and so a launch.
LAYOUTS: dict[str, tuple[int, list[dict[str, Any]]]] = {
    "selective and full recompute": (
        1,
        [{"training": {"recompute": "selective"}}, {"training": {"recompute": "full"}}],
    ),
    "tensor 2, with and without sequence parallelism and full recompute": (
        2,
        [
            {"parallel": {"tensor": 2}},
            {"parallel": {"tensor": 2, "sequence": True}},
            {"parallel": {"tensor": 2, "sequence": True}, "training": {"recompute": "full"}},
        ],
    ),
    "pipeline 2": (2, [{"parallel": {"pipeline": 2}}]),
    "pipeline 2 with virtual stages": (
        2,
        [{"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "without": "tied embeddings"}],
    ),
}
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, list[Any]]]:
    """Losses, gradient norms and sinks of each pattern in one process."""
    return run_ranks(train_all, 1, layouts=[{}])[0]["0"]


def test_patterns_differ(one_process: dict[str, dict[str, list[Any]]]) -> None:
    losses = sorted(result["losses"][0] for result in one_process.values())
    assert all(b - a > 1e-4 for a, b in pairwise(losses)), losses
    for result in one_process.values():
        assert sum(result["losses"][4:]) < sum(result["losses"][:4])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout: str, one_process: dict[str, dict[str, list[Any]]]) -> None:
    world_size, layouts = LAYOUTS[layout]
    ranks = run_ranks(train_all, world_size, layouts=layouts)
    for number, settings in enumerate(layouts):
        last = ranks[-1][str(number)]
        assert set(last) == set(one_process) - {settings.get("without")}
        for pattern, result in last.items():
            expected = one_process[pattern]
            assert result["losses"] == pytest.approx(expected["losses"], abs=1e-5), (settings, pattern)
            for rank in ranks:
                norms = rank[str(number)][pattern]["norms"]
                assert norms == pytest.approx(expected["norms"], rel=1e-5), (settings, pattern)
        _check_sinks([rank[str(number)]["windows, documents, sinks"]["sinks"] for rank in ranks], settings)


def _check_sinks(ranks: list[list[Any]], settings: dict[str, Any]) -> None:
    """The ranks' sinks together are each head of each of the 4 layers once."""
    heads = 4 // settings.get("parallel", {}).get("tensor", 1)
    places = [(layer, head) for rank in ranks for _, (layer, start) in rank for head in range(start, start + heads)]
    assert all(shape == [4, 4] for rank in ranks for shape, _ in rank)
    assert sorted(places) == [(layer, head) for layer in range(4) for head in range(4)], (settings, places)

"""Every layout of processes trains the same model: same losses and gradient norms as one process.

Weights come from the seed alone, without a checkpoint, so this also holds the initialisation to being the same in
every layout. The dense and the separator pattern have different losses, so it shows too that the separators reach
the layers of each rank and stage.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from tests.model.layout_worker import DOCUMENTS, PATTERNS, train_all
from tests.support.distributed_runner import run_ranks

INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
# Tied embeddings are summed over pipeline stages, and impossible with virtual ones.
UNTIED = [pattern for pattern in PATTERNS if pattern != "tied embeddings"]
# Enough where a row repeats others with one more setting.
ONE = {"patterns": ["windows, documents, sinks", DOCUMENTS]}
FEW = {"patterns": ["first and last layer full", "grouped queries, query-key norm", *ONE["patterns"]]}
COMPILED = {"compile": True, "loss_chunk": 40}
# A row = a layout, by the number of processes that are started for it; what is left of them are replicas.
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [
        {"training": {"recompute": "selective"}},
        {"training": {"recompute": "full"}},
        {"training": {"loss_chunk": 40}},
    ],
    2: [
        {"parallel": {"tensor": 2}},
        {"parallel": {"tensor": 2, "sequence": True}, "patterns": UNTIED},
        {"parallel": {"tensor": 2, "sequence": True}, "training": {"recompute": "full"}, "patterns": UNTIED},
        {"parallel": {"pipeline": 2}},
        {"parallel": {"pipeline": 2, "first_stage_layers": 1}, **FEW},
        {"parallel": INTERLEAVED, "patterns": UNTIED},
        {"patterns": UNTIED},
        {"parallel": {"context": 2}},
        {"parallel": {"context": 2, "sharded_optimizer": True}, "training": {"recompute": "selective"}, **FEW},
        {"parallel": {"tensor": 2}, "training": {"loss_chunk": 40}},
        {"parallel": {"tensor": 2, "sequence": True}, "training": {"loss_chunk": 40}, "patterns": UNTIED},
        # More than there are tokens: the logits are kept.
        {"parallel": {"tensor": 2}, "training": {"loss_chunk": 100_000}, **FEW},
        {"parallel": {"pipeline": 2}, "training": {"loss_chunk": 40}},
        {"parallel": {"context": 2}, "training": {"loss_chunk": 40}, **FEW},
        {"parallel": {"tensor": 2, "sequence": True}, "training": {**COMPILED, "recompute": "full"}, **ONE},
        {"parallel": {"pipeline": 2}, "training": {**COMPILED, "recompute": "selective"}, **ONE},
        {"parallel": {"overlap": True}, **FEW},
        {"parallel": {"context": 2, "overlap": True}, **ONE},
        {"parallel": {**INTERLEAVED, "overlap": True}, **FEW},
    ],
    4: [
        {"parallel": {"tensor": 2, "pipeline": 2}, "patterns": UNTIED},
        {"parallel": {"tensor": 2, "sequence": True}, "patterns": UNTIED},
        {"parallel": {"context": 4}, "patterns": UNTIED},
        {"parallel": {"context": 2, "tensor": 2, "sequence": True}, "training": {"recompute": "full"}, **FEW},
        {"parallel": {"context": 2, "pipeline": 2}, "patterns": UNTIED},
        {"parallel": {"context": 2, **INTERLEAVED}, **FEW},
        {"parallel": {**INTERLEAVED, "overlap": True}, **ONE},
        {"parallel": {"context": 2}, "patterns": UNTIED},
    ],
}
ROWS = [
    pytest.param(world_size, number, id=f"{world_size} processes: {layout.get('parallel')}, {layout.get('training')}")
    for world_size, layouts in LAYOUTS.items()
    for number, layout in enumerate(layouts)
]
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def trained(compile_cache: None) -> dict[int, list[list[dict[str, Any]]]]:
    """Results of each rank for each layout, by the number of processes; filled as launches are made."""
    return {}


@pytest.fixture(scope="module")
def one_process(trained: dict[int, list[Any]]) -> dict[str, dict[str, list[Any]]]:
    """Losses, gradient norms and sinks of each pattern in one process."""
    plain, *others = run_ranks(train_all, 1, layouts=[{}, *LAYOUTS[1]])[0]
    trained[1] = [others]
    return plain


def test_patterns_differ(one_process: dict[str, dict[str, list[Any]]]) -> None:
    losses = sorted(result["losses"][0] for result in one_process.values())
    assert all(b - a > 1e-4 for a, b in pairwise(losses)), losses
    for result in one_process.values():
        first, second = result["losses"]
        assert result["validation"][0] < second < first


@pytest.mark.parametrize(("world_size", "number"), ROWS)
def test_layout_equals_one_process(
    world_size: int, number: int, trained: dict[int, list[Any]], one_process: dict[str, dict[str, list[Any]]]
) -> None:
    if world_size not in trained:
        trained[world_size] = run_ranks(train_all, world_size, layouts=LAYOUTS[world_size])
    layout = LAYOUTS[world_size][number]
    ranks = [results[number] for results in trained[world_size]]
    assert set(ranks[0]) == set(layout.get("patterns", PATTERNS))
    for pattern in ranks[0]:
        expected = one_process[pattern]
        for rank in ranks:
            found = rank[pattern]
            assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5), pattern
            assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5), pattern
            assert found["validation"] == pytest.approx(expected["validation"], abs=1e-5), pattern
            assert found["pairs"] == expected["pairs"], pattern
            assert (found["context_bytes"][0] > 0) == ("context" in layout.get("parallel", {})), pattern
    _check_sinks([rank["windows, documents, sinks"]["sinks"] for rank in ranks], layout.get("parallel", {}))


def _check_sinks(ranks: list[list[Any]], parallel: dict[str, Any]) -> None:
    """The ranks of a replica together hold each head of each of the 4 layers once."""
    heads = 4 // parallel.get("tensor", 1)
    places = [(layer, head) for rank in ranks for _, (layer, start) in rank for head in range(start, start + heads)]
    replicas = len(ranks) // (parallel.get("tensor", 1) * parallel.get("pipeline", 1))
    assert all(shape == [4, 4] for rank in ranks for shape, _ in rank)
    assert sorted(places) == sorted([(layer, head) for layer in range(4) for head in range(4)] * replicas)

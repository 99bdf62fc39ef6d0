"""N + M steps are N steps, a checkpoint, and M more: bitwise in every layout, and from one layout into another.

A run of each layout saves after the first of its three steps. A second run starts from that checkpoint, in the same
layout or in another, and must end where the first one ended.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed_runner import run_ranks
from tests.training.resume_worker import HALF, STEPS, train_all

# By the number of processes, which share a launch.
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "one": {},
        "gated, tied, fp16": {
            "model": {"activation": "swiglu", "kv_heads": 2, "tied_embeddings": True},
            "training": {"precision": "fp16"},
        },
    },
    2: {
        "tensor": {"parallel": {"tensor": 2}},
        "tensor, sequence, recompute": {
            "parallel": {"tensor": 2, "sequence": True},
            "training": {"recompute": "full"},
        },
        "pipeline": {"parallel": {"pipeline": 2}},
        "uneven pipeline": {"parallel": {"pipeline": 2, "first_stage_layers": 1}},
        "interleaved": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
        "pipeline, selective, chunked loss": {
            "parallel": {"pipeline": 2},
            "training": {"recompute": "selective", "loss_chunk": 40},
        },
        "context": {"parallel": {"context": 2}},
        "data": {},
        "data, overlap": {"parallel": {"overlap": True}},
        "sharded": {"parallel": {"sharded_optimizer": True}},
        "sharded, gated, bf16": {
            "parallel": {"sharded_optimizer": True},
            "model": {"activation": "swiglu", "kv_heads": 2},
            "training": {"precision": "bf16"},
        },
    },
    4: {
        "tensor x pipeline": {"parallel": {"tensor": 2, "pipeline": 2}},
        "tensor x sharded": {"parallel": {"tensor": 2, "sharded_optimizer": True}},
    },
}
# Runs without a second half.
OTHERS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one worker": {"data": {"workers": 1}}, "two workers": {"data": {"workers": 2}}},
}
# (checkpoint of, layout that goes on from it), by the number of processes of the latter.
CROSSINGS: dict[int, list[tuple[str, str]]] = {
    1: [],
    2: [
        ("one", "sharded"),
        ("sharded", "data"),
        ("sharded", "interleaved"),
        ("sharded", "uneven pipeline"),
    ],
    4: [("sharded", "tensor x sharded")],
}
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def crossing_name(pair: tuple[str, str]) -> str:
    """Name of the run that goes on from another layout's checkpoint."""
    return f"{pair[0]} to {pair[1]}"


@pytest.fixture(scope="module")
def results(sample_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """What became of the runs of each number of processes, trained when first asked for."""
    root = tmp_path_factory.mktemp("layouts")
    done: dict[int, dict[str, Any]] = {}
    begun: set[int] = set()
    settings = {name: groups for layouts in LAYOUTS.values() for name, groups in layouts.items()}

    def resumed(name: str, source: str, groups: dict[str, Any]) -> dict[str, Any]:
        return {"name": name, "resume": str(root / source / "checkpoints" / f"step_{HALF:08d}"), **groups}

    def launch(processes: int) -> dict[str, Any]:
        for size in (1, 2, 4):
            if size > processes or size in done:
                continue
            if size in begun:
                pytest.fail(f"the launch of {size} processes has failed: see the first test that asked for it")
            begun.add(size)
            runs = [{"name": name, **groups} for name, groups in OTHERS.get(size, {}).items()]
            for name, groups in LAYOUTS[size].items():
                runs += [{"name": name, **groups}, resumed(f"{name} again", name, groups)]
            runs += [resumed(crossing_name(pair), pair[0], settings[pair[1]]) for pair in CROSSINGS[size]]
            ranks = run_ranks(train_all, size, root=str(root), cache=str(sample_cache), runs=runs)
            done[size] = ranks[0]
        return {name: result for found in done.values() for name, result in found.items()}

    return launch


@pytest.mark.parametrize(("processes", "layout"), [(size, name) for size, names in LAYOUTS.items() for name in names])
def test_resume_is_bitwise(results: Callable[[int], dict[str, Any]], processes: int, layout: str) -> None:
    found = results(processes)
    whole, again = found[layout], found[f"{layout} again"]
    assert len(whole["losses"]) == STEPS and len(set(whole["losses"])) == STEPS
    assert again["losses"] == whole["losses"][HALF:] and again["norms"] == whole["norms"][HALF:]
    assert {"optimizer.step", "rng.cpu", "state.tokens", "state.pairs"} < whole["state"].keys()
    assert {name for name, value in whole["state"].items() if again["state"].get(name) != value} == set()
    assert again["state"].keys() == whole["state"].keys()


@pytest.mark.parametrize(("processes", "pair"), [(size, pair) for size, pairs in CROSSINGS.items() for pair in pairs])
def test_resume_in_another_layout(
    results: Callable[[int], dict[str, Any]], processes: int, pair: tuple[str, str]
) -> None:
    """The last loss shows that Adam's moments and step count came along, the one before only the weights."""
    found = results(processes)
    losses = found[crossing_name(pair)]["losses"]
    assert losses == pytest.approx(found[pair[0]]["losses"][HALF:], abs=2e-6)
    assert found[crossing_name(pair)]["norms"] == pytest.approx(found[pair[0]]["norms"][HALF:], rel=1e-5)


def test_sharded_optimizer_trains_as_the_unsharded_one(results: Callable[[int], dict[str, Any]]) -> None:
    found = results(2)
    assert found["sharded"]["losses"] == pytest.approx(found["data"]["losses"], abs=1e-6)
    assert found["sharded"]["norms"] == pytest.approx(found["data"]["norms"], rel=1e-6)


@pytest.mark.parametrize("other", list(OTHERS[1]))
def test_order_of_the_data_does_not_depend_on_workers(results: Callable[[int], dict[str, Any]], other: str) -> None:
    found = results(1)
    assert found[other]["losses"] == found["one"]["losses"]
    assert found[other]["state"] == found["one"]["state"]

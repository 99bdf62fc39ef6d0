"""Muon and parameter groups in every layout: the losses of one process, and a bitwise resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed_runner import run_ranks
from tests.training.resume_worker import HALF, train_all

MUON = {
    "optimizer": "muon",
    "groups": [{"match": "*.[02].*", "lr_factor": 0.5}, {"match": "*_layernorm.*", "weight_decay": 0.2}],
}
GATED = {"activation": "swiglu", "kv_heads": 2, "tied_embeddings": True}
# Of a model with fused gates and grouped keys, and of the plain one.
MODELS: dict[str, dict[str, Any]] = {
    "gated": {"optim": MUON, "model": GATED},
    "plain": {"optim": MUON},
    "groups": {"optim": {"groups": MUON["groups"]}},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2},
    "tensor, sequence": {"tensor": 2, "sequence": True},
    "pipeline": {"pipeline": 2},
    "interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "context": {"context": 2},
    "data": {},
    "sharded": {"sharded_optimizer": True},
}
CASES = [
    ("gated", "tensor"),
    ("gated", "pipeline"),
    ("gated", "data"),
    ("plain", "tensor, sequence"),
    ("plain", "interleaved"),
    ("plain", "context"),
    ("groups", "sharded"),
    ("groups", "pipeline"),
]
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def results(sample_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """Runs of one process by model, those of two by model and layout; each layout's is resumed from its first step, and
    TP 2's on one process."""
    root = tmp_path_factory.mktemp("muon")
    done: dict[int, dict[str, Any]] = {}

    def resumed(name: str, source: str, **groups: Any) -> dict[str, Any]:
        return {"name": name, "resume": str(root / source / "checkpoints" / f"step_{HALF:08d}"), **groups}

    def launch(processes: int) -> dict[str, Any]:
        if processes in done:
            return done[processes]
        runs: list[dict[str, Any]] = []
        if processes == 1:
            runs = [{"name": name, **groups} for name, groups in MODELS.items()]
            launch(2)
            runs.append(resumed("gated, tensor to one", "gated, tensor", **MODELS["gated"]))
        else:
            for model, layout in CASES:
                name, groups = f"{model}, {layout}", {**MODELS[model], "parallel": LAYOUTS[layout]}
                runs += [{"name": name, **groups}, resumed(f"{name} again", name, **groups)]
        done[processes] = run_ranks(train_all, processes, root=str(root), cache=str(sample_cache), runs=runs)[0]
        return done[processes]

    return launch


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_losses_are_those_of_one_process(results: Callable[[int], dict[str, Any]], model: str, layout: str) -> None:
    one, found = results(1)[model], results(2)[f"{model}, {layout}"]
    assert found["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert found["norms"] == pytest.approx(one["norms"], rel=1e-5)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_resume_is_bitwise(results: Callable[[int], dict[str, Any]], model: str, layout: str) -> None:
    whole, again = (results(2)[f"{model}, {layout}{suffix}"] for suffix in ("", " again"))
    assert again["losses"] == whole["losses"][HALF:]
    assert again["state"] == whole["state"]
    muon = {name for name in whole["state"] if name.startswith("optimizer.state.momentum_buffer.")}
    # Four matrices, the gated one kept as its two halves.
    assert len(muon) == {"gated": 4, "plain": 4, "groups": 0}[model]


def test_resume_in_another_layout(results: Callable[[int], dict[str, Any]]) -> None:
    assert results(1)["gated, tensor to one"]["losses"] == pytest.approx(results(1)["gated"]["losses"][HALF:], abs=1e-5)

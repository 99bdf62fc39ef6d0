"""Steps with a loss or gradients that cannot be used leave weights and optimizer as they were, on all ranks alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.base.errors import EXIT_BAD_STEPS
from sepllm_train.config.schema import TrainingConfig
from sepllm_train.training.checkpoint import digest
from sepllm_train.training.state import TrainState
from sepllm_train.training.update import ENOUGH, BadStepDetector
from tests.faults import bad_step_worker
from tests.faults.bad_step_worker import checkpoint_of
from tests.faults.processes import Launcher, records
from tests.support.distributed_runner import run_ranks

NAN = "nan"
# Layouts and precisions, and the rank on which the loss is spoiled: one that computes a loss.
NAN_RUNS: dict[str, dict[str, Any]] = {
    "data2_fp32": {"rank": 1},
    "data2_bf16": {"rank": 1, "training": {"precision": "bf16"}},
    "data2_fp16": {"rank": 1, "training": {"precision": "fp16"}},
    "tensor2": {"rank": 0, "parallel": {"tensor": 2}},
    "pipeline2": {"rank": 1, "parallel": {"pipeline": 2}},
    "context2": {"rank": 0, "parallel": {"context": 2}},
    "sharded": {"rank": 1, "parallel": {"sharded_optimizer": True}},
}
STEPS, SPIKE = ENOUGH + 6, ENOUGH + 4


@pytest.fixture(scope="module")
def outcomes(sample_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """All runs on two ranks in one launch: (folder of the runs, what happened on each rank by name)."""
    root = tmp_path_factory.mktemp("bad_steps")
    runs = [
        {
            "name": name,
            "spoiled": {2: NAN, 4: "inf"},
            **options,
            "training": {"steps": 5, **options.get("training", {})},
        }
        for name, options in NAN_RUNS.items()
    ]
    spiky = {"spoiled": {SPIKE: "1000"}, "rank": 0, "training": {"steps": STEPS, "spike_factor": 20.0}}
    spiky["training"] |= {"checkpoint_interval": SPIKE - 2, "keep_checkpoints": 2}
    resumed = checkpoint_of(str(root), "spike", SPIKE - 2)
    runs += [{"name": "spike", **spiky}, {"name": "spike_resumed", "resume": resumed, **spiky}]
    stopped = {"spoiled": dict.fromkeys(range(3, 9), NAN), "rank": 1, "training": {"steps": 9, "max_bad_steps": 3}}
    runs.append({"name": "stopped", **stopped})
    ranks = run_ranks(bad_step_worker.train_spoiled, 2, root=str(root), cache=str(sample_cache), runs=runs)
    return root, ranks


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAN_RUNS)
def test_step_without_finite_loss_is_skipped(outcomes: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    root, ranks = outcomes
    for rank in ranks:
        assert rank[name]["changed"] == [1, 3, 5] and sorted(rank[name]["bad"]) == ["2", "4"]
        assert len(set(rank[name]["rates"])) == 5, "the schedule goes on"
    assert ranks[0][name]["bad"] == ranks[1][name]["bad"]
    told = [record for record in records(root / name) if "train/bad_steps" in record]
    assert [r["train/bad_steps"] for r in told] == [0, 1, 0, 1, 0]
    # The loss of an interval without a good step is not known; the others are.
    assert [r["train/loss"] is None for r in told] == [False, True, False, True, False]
    assert [r["tokens"] for r in told] == [2 * 64 * step for step in range(1, 6)]
    kept = records(root / name, "bad_steps.jsonl")
    assert [r["step"] for r in kept] == [2, 4]
    for record in kept:
        ((prefix, documents),) = record["documents"].items()
        assert Path(f"{prefix}.idx").is_file() and documents == sorted(documents) and len(documents) >= 1


@pytest.mark.distributed
def test_documents_do_not_depend_on_the_layout(outcomes: tuple[Path, list[dict[str, Any]]]) -> None:
    root, _ = outcomes
    found = [[r["documents"] for r in records(root / name, "bad_steps.jsonl")] for name in NAN_RUNS]
    assert all(other == found[0] for other in found) and found[0][0] != found[0][1]


@pytest.mark.distributed
def test_spike_is_skipped_and_a_resumed_run_judges_alike(outcomes: tuple[Path, list[dict[str, Any]]]) -> None:
    root, ranks = outcomes
    for rank in ranks:
        assert rank["spike"]["changed"] == [n for n in range(1, STEPS + 1) if n != SPIKE]
        (reason,) = rank["spike"]["bad"].values()
        assert "is above training.spike_factor=20 x the usual" in reason
        assert rank["spike_resumed"]["bad"] == rank["spike"]["bad"]
    assert digest(root / "spike") == digest(root / "spike_resumed")


@pytest.mark.distributed
def test_too_many_in_a_row_end_the_run(outcomes: tuple[Path, list[dict[str, Any]]]) -> None:
    root, ranks = outcomes
    for rank in ranks:
        code, sentence = rank["stopped"]["stopped"]
        assert code == EXIT_BAD_STEPS and "3 steps in a row up to step 5 were skipped (the loss is nan)" in sentence
        assert rank["stopped"]["changed"] == [1, 2]
    assert [r["step"] for r in records(root / "stopped", "bad_steps.jsonl")] == [3, 4, 5]


def test_diverged_run_says_so(launcher: Launcher) -> None:
    """From the command line, with weights that a huge learning rate has really spoiled."""
    options = ("optim.lr=1e30", "optim.min_lr=0", "optim.warmup_steps=0", "training.max_bad_steps=4")
    with launcher.alone("diverged", "training.steps=100", *options) as run:
        assert run.code() == EXIT_BAD_STEPS
        lines = run.text().strip().splitlines()
        assert lines[-1].startswith("error: 4 steps in a row up to step ") and "lower optim.lr" in lines[-1]
        assert sum(line.startswith("warning: step ") for line in lines) == 1
        assert run.status() == "failed" and not run.steps_saved()


def test_a_run_without_a_good_step_or_a_finite_validation_loss_has_failed() -> None:
    state = TrainState()
    detector = BadStepDetector(TrainingConfig(steps=2), state)
    detector.judge(math.nan, 1.0)
    reason = detector.judge(5.0, math.inf)
    failure = detector.failure_of_run(reason, 5.0)
    assert failure is not None and failure.code == EXIT_BAD_STEPS
    assert "all 2 steps of the run were skipped, the last one because the gradient norm is inf" in str(failure)
    state.bad_steps = 1
    assert "validation loss after the last step is nan" in str(detector.failure_of_run(reason, math.nan))
    assert detector.failure_of_run(reason, 5.0) is None and detector.failure_of_run(None, None) is None
    # Steps that fp16 overflowed in changed nothing either.
    detector.state.overflows = detector.config.steps
    assert "the last one because fp16 overflowed" in str(detector.failure_of_run(None, 5.0))


def test_median_of_good_steps_decides() -> None:
    state = TrainState()
    detector = BadStepDetector(TrainingConfig(spike_factor=3.0), state)
    norms = [1.0] * (ENOUGH // 2) + [2.0] * (ENOUGH // 2)
    # Too early to tell.
    assert detector.judge(5.0, 100.0) is None
    state.recent_norms.clear()
    assert all(detector.judge(5.0, norm) is None for norm in norms)
    assert detector.judge(5.0, 4.5) is None
    assert "is above" in str(detector.judge(5.0, 6.1)) and state.bad_in_a_row == 1
    assert "is above" in str(detector.judge(5.0, 1e9)), "a spike is no new measure"
    assert "the loss is nan" in str(detector.judge(math.nan, 1.0)) and state.bad_in_a_row == 3
    assert detector.judge(5.0, 1.0) is None and (state.bad_in_a_row, state.bad_steps) == (0, 3)

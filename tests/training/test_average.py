"""Training on from the mean of checkpoints, and what would continue or overwrite it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.base.errors import UserError
from sepllm_train.runs.average import average_checkpoints
from sepllm_train.runs.evaluate import evaluate_run
from sepllm_train.runs.open import open_run
from sepllm_train.training.checkpoint import digest
from sepllm_train.training.run_folder import enter


@pytest.fixture(scope="module")
def mean(trainer: Any, finished: Callable) -> Path:
    """The mean of the last three of four checkpoints."""
    source = finished("average_source", "training.checkpoint_interval=1", "training.keep_checkpoints=4")
    average_checkpoints(trainer.root / source, [2, 3, 4], trainer.root / "mean")
    return trainer.root / "mean"


def test_a_run_begins_with_the_mean(trainer: Any, mean: Path) -> None:
    done = trainer.here("name=after_mean", f"init_from={mean}")
    assert done.code == 0, done.errors
    losses = trainer.values("after_mean", "val/loss")
    run = open_run(mean)
    assert losses[0] == pytest.approx(evaluate_run(run)["loss"], abs=1e-5) and losses[0] != losses[-1]
    initial = json.loads((trainer.root / "after_mean" / "run.json").read_text())["initial_weights"]
    assert initial["step"] == 4 and initial["manifest_sha256"] == run.checkpoint.manifest_sha256


@pytest.mark.parametrize(
    "overrides",
    [
        ["name=mean"],
        ["name=mean", "resume=never"],
        ["name=mean_again", "resume={mean}", "training.steps=8"],
        ["name=mean_again", "resume={mean}/checkpoints/step_00000004", "training.steps=8"],
    ],
    ids=" ".join,
)
def test_no_run_continues_from_it_or_takes_its_folder(trainer: Any, mean: Path, overrides: list[str]) -> None:
    before, files = digest(mean), sorted(mean.rglob("*"))
    done = trainer.here(*(part.format(mean=mean) for part in overrides))
    assert done.code == 2 and done.sentence == (
        f"error: {mean} holds averaged weights without an optimizer, from which no run continues: train on with "
        f"init_from={mean} name=NEW."
    )
    # The ranks of a launch look later, and together.
    config = replace(open_run(mean).config, resume="never")
    with pytest.raises(UserError, match="holds averaged weights without an optimizer"):
        enter(config, {}, {})
    assert (digest(mean), sorted(mean.rglob("*"))) == (before, files)
    assert not (trainer.root / "mean_again").exists()

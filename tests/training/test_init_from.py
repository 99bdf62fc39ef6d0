"""init_from: weights of another run, with a pattern, an optimizer and a schedule of the new run's own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import Config, OptimConfig, TrainingConfig
from sepllm_train.config.validate import validate
from sepllm_train.training.checkpoint import digest, digests


@pytest.fixture(scope="module")
def source(trainer: Any, finished: Callable) -> Path:
    """A copy of a dense run, that can be taken away."""
    folder = trainer.root / "init_source"
    shutil.copytree(trainer.root / finished("dense", "attention=dense"), folder)
    return folder


def test_weights_are_the_other_runs(trainer: Any, source: Path) -> None:
    """From a dense run to a pattern: the first validation is that of the dense weights under the pattern."""
    done = trainer("name=init_post", f"init_from={source}")
    assert done.code == 0, done.errors
    assert "weights of " in done.output
    records = trainer.records("init_post")
    assert records[0]["step"] == 0 and records[-1]["step"] == 4
    # Untrained weights have the loss of a guess.
    dense = trainer.values("dense", "val/loss")
    assert records[0]["val/loss"] < dense[0] and records[0]["val/loss"] != dense[-1]
    same = trainer.here("name=init_dense_again", "attention=dense", f"init_from={source}")
    assert same.code == 0, same.errors
    assert trainer.values("init_dense_again", "val/loss")[0] == dense[-1]


def test_a_damaged_checkpoint_that_is_skipped_is_told(trainer: Any, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source")
    damaged = tmp_path / "source" / "checkpoints" / "step_00000004"
    (damaged / "common.pt").unlink()
    done = trainer.here("name=init_older", "attention=dense", f"init_from={tmp_path / 'source'}", "dry_run=true")
    assert done.code == 0, done.errors
    assert f"skipped the damaged checkpoint {damaged} ({damaged / 'common.pt'} is missing)" in done.errors


@pytest.mark.slow
@pytest.mark.distributed
def test_in_another_layout(trainer: Any, finished: Callable) -> None:
    """The optimizer's copy of the weights is theirs too: half precision has one."""
    short = ["training.precision=bf16", "training.steps=2"]
    start = [*short, f"init_from={trainer.root / finished('init_bf16', 'attention=dense', *short)}"]
    losses = []
    for name, layout in (("alone", []), ("tensor", ["parallel.tensor=2"])):
        finished(f"init_{name}", *start, *layout, processes=2 if layout else 0)
        losses.append(trainer.values(f"init_{name}", "val/loss"))
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_interrupted_run_goes_on_without_the_source(trainer: Any, finished: Callable, source: Path) -> None:
    start = [f"init_from={source}"]
    checkpoints = trainer.root / finished("init_whole", *start) / "checkpoints"
    source.rename(trainer.root / "init_moved")
    try:
        again = trainer("name=init_again", *start, f"resume={checkpoints / 'step_00000002'}")
    finally:
        (trainer.root / "init_moved").rename(source)
    assert again.code == 0, again.errors
    last = trainer.root / "init_again" / "checkpoints" / "step_00000004"
    assert dict(digests(last)) and digest(last) == digest(checkpoints / "step_00000004")
    # run.json tells what the first of them began with.
    whole, later = (json.loads((trainer.root / name / "run.json").read_text()) for name in ("init_whole", "init_again"))
    assert whole["initial_weights"]["checkpoint"] == str(source / "checkpoints" / "step_00000004")
    assert whole["initial_weights"]["step"] == 4 and whole["initial_weights"] == later["initial_weights"]


def test_schedule_of_the_longer_run_goes_on(trainer: Any, finished: Callable) -> None:
    long = ["training.steps=8", "optim.warmup_steps=2", "training.validation_interval=0"]
    finished("init_long", *long)
    rates = trainer.values("init_long", "train/lr")
    late = ["optim.schedule_steps=8", "optim.schedule_start=4", "optim.warmup_steps=2"]
    finished("init_late", *late, f"init_from={trainer.root / 'init_long'}")
    assert trainer.values("init_late", "train/lr") == rates[4:]
    run = json.loads((trainer.root / "init_late" / "run.json").read_text())
    assert run["schedule"]["optim.schedule_start"] == 4 and run["identity"]["init_from"].endswith("init_long")
    # Continued from its own second step it is at the schedule's sixth.
    middle = trainer.root / "init_late" / "checkpoints" / "step_00000002"
    done = trainer.here("name=init_later", *late, f"init_from={trainer.root / 'init_long'}", f"resume={middle}")
    assert done.code == 0, done.errors
    assert trainer.values("init_later", "train/lr") == rates[6:]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["init_from={root}/nowhere"], "init_from={root}/nowhere: there is no checkpoint there; give a run folder"),
        (["init_from={root}/one", "model.layers=3"], "has model.layers=2, this run 3: set it so"),
        (["init_from={root}/one", "attention.qk_norm=true"], "has attention.qk_norm=False, this run True"),
    ],
)
def test_weights_that_do_not_fit(trainer: Any, finished: Callable, overrides: list[str], words: str) -> None:
    finished("one")
    done = trainer.here("name=init_wrong", *(part.format(root=trainer.root) for part in overrides))
    assert done.code == 2 and words.format(root=trainer.root) in done.sentence, done.errors
    assert not (trainer.root / "init_wrong").exists()


@pytest.mark.parametrize(
    ("settings", "steps", "words"),
    [
        ({"schedule_start": 10}, 4, "schedule_start=10 goes on with another run's schedule: add init_from=RUN"),
        ({"schedule_start": 10}, 4, "optim.schedule_start=10 and training.steps=4 go beyond the schedule's training.s"),
        ({"schedule_start": 5, "schedule_steps": 8}, 4, "go beyond the schedule's optim.schedule_steps=8"),
        ({"schedule_start": -1}, 4, "optim.schedule_start=-1 must be 0 or more"),
        ({"schedule_steps": 0}, 4, "optim.schedule_steps=0 must be at least 1"),
        ({"schedule_steps": 9, "warmup_steps": 10}, 4, "optim.warmup_steps=10 must lie between 0 and optim.schedule"),
    ],
)
def test_schedules_that_do_not_fit(settings: dict[str, int], steps: int, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        validate(Config(optim=OptimConfig(**settings), training=TrainingConfig(steps=steps)), 1)


def test_a_transformers_model_is_to_be_imported(trainer: Any) -> None:
    folder = trainer.root / "init_theirs"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    done = trainer.here("name=init_wrong", f"init_from={folder}")
    assert done.code == 2 and "`sepllm import " in done.sentence


YARN = [
    "model.rotary_scaling.rope_type=yarn",
    "model.rotary_scaling.factor=4",
    "model.rotary_scaling.original_max_position_embeddings=32",
]


def test_positions_may_be_scaled_anew(trainer: Any, finished: Callable) -> None:
    finished("one")
    start = [f"init_from={trainer.root / 'one'}", "training.checkpoint_steps=[0]"]
    scaled = trainer.here("name=init_scaled", *YARN, "model.rotary_base=20000", *start)
    assert scaled.code == 0, scaled.errors
    assert (
        "init_from: other rotary positions than those its weights were trained with: model.rotary_base 10000 -> 20000 "
        "| model.rotary_scaling none -> yarn, factor 4, original_max_position_embeddings 32" in scaled.unfolded
    )
    assert "positions: rotary base 20,000 | scaling yarn, factor 4" in scaled.unfolded
    assert "cosines and sines x 1.1386 | made for 128 tokens, sequences have 128" in scaled.unfolded
    assert "raise model.rotary_scaling.factor" not in scaled.unfolded
    # The weights are the same, what they compute is not.
    assert trainer.values("init_scaled", "val/loss")[0] != trainer.values("one", "val/loss")[-1]
    # From there on with the same positions there is nothing to say.
    same = trainer.here(
        "name=init_same", *YARN, "model.rotary_base=20000", f"init_from={trainer.root / 'init_scaled'}", "dry_run=true"
    )
    assert same.code == 0 and "other rotary positions" not in same.output, same.errors
    back = trainer.here("name=init_back", f"init_from={trainer.root / 'init_scaled'}", "dry_run=true")
    assert "rotary_scaling yarn, factor 4, original_max_position_embeddings 32 -> none" in back.unfolded


def test_scaling_is_of_the_run(trainer: Any, finished: Callable) -> None:
    """It is on record where there is one, and a run continues with it alone."""
    plain, scaled = finished("one"), finished("scaled", *YARN)
    records = [json.loads((trainer.root / name / "run.json").read_text())["identity"] for name in (plain, scaled)]
    own = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert "model.rotary_scaling" not in records[0] and records[1] == {**records[0], "model.rotary_scaling": own}
    more = ["training.steps=6", "name=scaled_on"]
    for source, overrides in ((plain, YARN), (scaled, []), (scaled, [*YARN, "model.rotary_scaling.factor=8"])):
        done = trainer.here(*more, *overrides, f"resume={trainer.root / source}")
        assert done.code == 2 and "was written with model.rotary_scaling=" in done.sentence, done.errors
        assert not (trainer.root / "scaled_on").exists()
    done = trainer.here(*more, *YARN, f"resume={trainer.root / scaled / 'checkpoints' / 'step_00000002'}")
    assert done.code == 0, done.errors
    assert trainer.values("scaled_on", "train/loss")[0] == trainer.values(scaled, "train/loss")[2]

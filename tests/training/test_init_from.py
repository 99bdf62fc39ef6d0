"""init_from: weights of another run, with a pattern, an optimizer and a schedule of the new run's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from sepllm_train.training.checkpoint import digest, digests


def test_weights_are_the_other_runs(trainer: Any, finished: Callable) -> None:
    """From a dense run to a pattern: the first validation is that of the dense weights under the pattern."""
    finished("dense", "attention=dense")
    done = trainer("name=post", f"init_from={trainer.root / 'dense'}")
    assert done.code == 0, done.errors
    assert "weights of " in done.output
    records = trainer.records("post")
    assert records[0]["step"] == 0 and records[-1]["step"] == 4
    # Untrained weights have the loss of a guess.
    dense = trainer.values("dense", "val/loss")
    assert records[0]["val/loss"] < dense[0] and records[0]["val/loss"] != dense[-1]
    same = trainer("name=dense_again", "attention=dense", f"init_from={trainer.root / 'dense'}")
    assert same.code == 0, same.errors
    assert trainer.values("dense_again", "val/loss")[0] == dense[-1]


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_in_another_layout(trainer: Any, finished: Callable, precision: str) -> None:
    """The optimizer's copy of the weights is theirs too: half precision has one."""
    source = finished(f"dense_{precision}", "attention=dense", f"training.precision={precision}")
    start = [f"training.precision={precision}", f"init_from={trainer.root / source}"]
    losses = []
    for name, layout in (("alone", []), ("tensor", ["parallel.tensor=2"])):
        done = trainer(f"name={name}_{precision}", *start, *layout, processes=2 if layout else 1)
        assert done.code == 0, done.errors
        losses.append(trainer.values(f"{name}_{precision}", "val/loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if precision == "fp32" else 5e-3)


def test_interrupted_run_goes_on_without_the_source(trainer: Any, finished: Callable) -> None:
    finished("source", "attention=dense")
    start = [f"init_from={trainer.root / 'source'}", "training.steps=4"]
    assert trainer("name=whole", *start).code == 0
    checkpoints = trainer.root / "whole" / "checkpoints"
    (trainer.root / "source").rename(trainer.root / "moved")
    assert trainer("name=again", *start, f"resume={checkpoints / 'step_00000002'}").code == 0
    again = trainer.root / "again" / "checkpoints" / "step_00000004"
    assert dict(digests(again)) and digest(again) == digest(checkpoints / "step_00000004")


def test_schedule_of_the_longer_run_goes_on(trainer: Any, finished: Callable) -> None:
    long = ["training.steps=8", "optim.warmup_steps=2", "training.validation_interval=0"]
    finished("long", *long)
    rates = trainer.values("long", "train/lr")
    late = ["optim.schedule_steps=8", "optim.schedule_start=4", "optim.warmup_steps=2"]
    finished("late", *late, f"init_from={trainer.root / 'long'}")
    assert trainer.values("late", "train/lr") == rates[4:]
    run = json.loads((trainer.root / "late" / "run.json").read_text())
    assert run["schedule"]["optim.schedule_start"] == 4 and run["identity"]["init_from"].endswith("long")
    # Continued from its own second step it is at the schedule's sixth.
    middle = trainer.root / "late" / "checkpoints" / "step_00000002"
    done = trainer("name=later", *late, f"init_from={trainer.root / 'long'}", f"resume={middle}")
    assert done.code == 0, done.errors
    assert trainer.values("later", "train/lr") == rates[6:]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["init_from={root}/nowhere"], "init_from={root}/nowhere: there is no checkpoint there; give a run folder"),
        (["init_from={root}/one", "model.layers=3"], "has model.layers=2, this run 3: set it so"),
        (["init_from={root}/one", "attention.qk_norm=true"], "has attention.qk_norm=False, this run True"),
        (["init_from={root}/one", "data.sample_vocabulary=2048"], "model.vocabulary=4096, this run 2048"),
        (["optim.schedule_start=10"], "optim.schedule_start=10 and training.steps=4 go beyond the schedule's"),
        (["optim.schedule_start=-1"], "optim.schedule_start=-1 must be 0 or more"),
        (["optim.schedule_steps=0"], "optim.schedule_steps=0 must be at least 1"),
    ],
)
def test_mistakes(trainer: Any, finished: Callable, overrides: list[str], words: str) -> None:
    finished("one")
    done = trainer("name=wrong", *(part.format(root=trainer.root) for part in overrides))
    assert done.code == 2 and words.format(root=trainer.root) in done.sentence, done.errors
    assert not (trainer.root / "wrong").exists()


def test_a_transformers_model_is_to_be_imported(trainer: Any) -> None:
    folder = trainer.root / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    done = trainer("name=wrong", f"init_from={folder}")
    assert done.code == 2 and "scripts/import_hf.py" in done.sentence

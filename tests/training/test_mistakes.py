"""A user's mistake ends with one sentence and code 2, before anything is written."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from typing import Any

import pytest

from sepllm_train.cli.main import main


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["experiment=demo_sep"], "write +experiment=demo_sep"),
        (["nonsense"], "KEY=VALUE"),
        (["+experiment=pythia160_sep"], "did you mean pythia160m_sep"),
        (["model=pythia150m"], "pythia160m"),
        (["model=3"], "the name of a file in configs/"),
        (["model=[1]"], "the name of a file in configs/"),
        (["model={depth: 1}"], "model takes the name of a file in configs/; known are demo"),
        (["training.stepss=3"], "did you mean training.steps"),
        (["training.steps=many"], "training.steps: Value 'many'"),
        (["attention.pattern=[1]"], "attention.pattern"),
        (["data=prefixes", "data.prefixes=/tmp/text"], "write it in brackets, 'data.prefixes=[PREFIX,...]'"),
        (["logging.tags={a: 1}"], "logging.tags is a list"),
        (["attention.window=0"], "attention.window=0"),
        (["model.layers=11", "parallel.pipeline=2", "dry_run=true"], "model.layers=11 must be a multiple of"),
        (["parallel.context=3", "dry_run=true"], "data.sequence_length=2048 must be a multiple of 6"),
        (["training.micro_batch=3"], "training.global_batch=1024"),
    ],
)
def test_mistake_in_the_configuration(overrides: list[str], words: str, capsys: Any) -> None:
    assert main(["pretrain", *overrides]) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: ") and sentence.count("\n") == 1 and words in sentence


def told_and_nothing_written(trainer: Any, outcome: Any, words: str) -> None:
    assert outcome.code == 2
    assert outcome.sentence.startswith("error: ") and words in outcome.sentence
    assert "Traceback" not in outcome.errors
    assert not (trainer.root / "mistake").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["attention.separators=[dot]"], "unknown separator class 'dot'"),
        (["parallel.tensor=2"], "size 1 cannot be split into parallel.tensor=2"),
        (["data=prefixes", "data.prefixes=[nowhere/text]"], "There is no dataset at"),
        (["data.sequence_length=500000"], "fewer than one sequence of data.sequence_length=500000"),
        (["model.vocabulary=100"], "model.vocabulary=100 is smaller than the 4096 entries"),
        (["attention.backend=dense"], "attention.backend=dense: "),
        (["dry_run=true", "model.rotary_fraction=0.2"], "model.rotary_fraction=0.2"),
        (["data.cache=/proc/none"], "choose another data.cache"),
    ],
)
def test_mistake(trainer: Any, overrides: list[str], words: str) -> None:
    outcome = trainer.here("name=mistake", *overrides)
    told_and_nothing_written(trainer, outcome, words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.steps=many"], "training.steps: Value 'many'"),
        (["resume=nowhere"], "resume=nowhere: there is no checkpoint there"),
    ],
)
def test_mistake_on_the_command_line(trainer: Any, overrides: list[str], words: str) -> None:
    """Found before and after the processes are a grid, in a process of its own to its end."""
    outcome = trainer("name=mistake", *overrides)
    told_and_nothing_written(trainer, outcome, words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["name=one"], "holds a finished run: choose another name=, or train on with resume="),
        (["name=one", "resume=never"], "holds a finished run"),
        (["name=other", "resume=one", "model.layers=1"], "model.layers=2, this run has 1"),
        (["name=other", "resume=one", "attention.window=32"], "attention.window=64, this run has 32"),
        (
            ["name=other", "resume=one", "attention.placement=shuffled"],
            "attention.placement=natural, this run has shuffled",
        ),
        (["name=other", "resume=one"], "nothing is left of training.steps=4"),
    ],
)
def test_mistake_about_an_earlier_run(trainer: Any, finished: Callable, overrides: list[str], words: str) -> None:
    finished("one")
    outcome = trainer.here(*overrides)
    assert outcome.code == 2 and words in outcome.sentence
    assert not (trainer.root / "other").exists()


def test_running_run_is_not_continued_as_another(trainer: Any, finished: Callable) -> None:
    name = finished("one")
    run = trainer.root / name / "run.json"
    text = run.read_text()
    run.write_text(text.replace("finished", "running"))
    try:
        back = trainer.here(f"name={name}", f"resume={trainer.root / name / 'checkpoints' / 'step_00000002'}")
        assert back.code == 2 and "in use by an earlier run" in back.sentence
        changed = trainer.here(f"name={name}", "optim.lr=1e-3")
        assert changed.code == 2 and "optim.lr=0.002, this run has 0.001" in changed.sentence
        refused = trainer.here(f"name={name}", "resume=never")
        assert refused.code == 2 and "in use by an earlier run" in refused.sentence
    finally:
        run.write_text(text)


def test_run_stopped_before_its_first_checkpoint_is_not_overwritten_by_another(
    trainer: Any, finished: Callable
) -> None:
    folder = trainer.root / "early"
    folder.mkdir()
    run = json.loads((trainer.root / finished("one") / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"status": "running"}))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    outcome = trainer.here("name=early", "attention=dense")
    assert outcome.code == 2 and "attention.pattern=sep, this run has dense" in outcome.sentence
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_two_processes_do_not_share_a_run(trainer: Any) -> None:
    folder = trainer.root / "busy"
    folder.mkdir()
    with open(folder / ".lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        outcome = trainer("name=busy")
    assert outcome.code == 2 and "another process is training" in outcome.sentence


@pytest.mark.distributed
def test_said_once_by_all_ranks(trainer: Any) -> None:
    outcome = trainer("name=mistake", "training.global_batch=3", processes=2)
    assert outcome.code != 0
    lines = outcome.errors.splitlines()
    assert sum(line.startswith("error: training.global_batch=3") for line in lines) == 1
    # torchrun's own block repeats it at its end.
    assert any("training.global_batch=3" in line for line in lines[-3:])


def test_damaged_checkpoint_is_named(trainer: Any, finished: Callable) -> None:
    finished("one")
    source = trainer.root / "one" / "checkpoints" / "step_00000002"
    damaged = trainer.root / "damaged"
    damaged.mkdir()
    for file in source.iterdir():
        content = file.read_bytes()
        (damaged / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".distcp" else content)
    outcome = trainer.here("name=other", f"resume={damaged}")
    assert outcome.code == 2 and "the checkpoint is damaged" in outcome.sentence
    assert f"{damaged}/__0_0.distcp has " in outcome.sentence

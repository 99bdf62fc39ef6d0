"""A run folder that others change: noticed while the run trains, and nothing lost that can be kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.base.errors import EXIT_USER_ERROR
from sepllm_train.training.checkpoint import digest
from sepllm_train.training.loop import Loop

WITHOUT_CHECKPOINTS = ("training.checkpoint_interval=0", "training.validation_interval=0")


@pytest.fixture
def disturb(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[Path], Any]], None]:
    """Lets something happen to the folder of a run right after a step."""

    def after(step: int, harm: Callable[[Path], Any]) -> None:
        take = Loop._step

        def disturbed(loop: Loop, *arguments: Any) -> Any:
            result = take(loop, *arguments)
            if loop.live.state.step == step:
                harm(loop.live.folder)
            return result

        monkeypatch.setattr(Loop, "_step", disturbed)

    return after


def replace_file(path: Path) -> None:
    """As editors do."""
    path.with_suffix(".new").write_text("x: 1\n")
    os.rename(path.with_suffix(".new"), path)


def cut(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(10)


HARMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "metrics_removed": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl was removed"),
    "metrics_replaced": (lambda run: replace_file(run / "metrics.jsonl"), "metrics.jsonl was replaced"),
    "config_removed": (lambda run: (run / "config.yaml").unlink(), "config.yaml was removed"),
    "config_replaced": (lambda run: replace_file(run / "config.yaml"), "config.yaml was replaced"),
    "config_written": (lambda run: (run / "config.yaml").write_text("name: other\n"), "config.yaml was replaced"),
    "run_json_removed": (lambda run: (run / "run.json").unlink(), "run.json was removed"),
    "environment_removed": (lambda run: (run / "environment.json").unlink(), "environment.json was removed"),
    "folder_removed": (shutil.rmtree, " was removed while the run trained"),
    "folder_moved": (lambda run: run.rename(run.with_name(f"{run.name}_moved")), " was removed while the run trained"),
}


@pytest.mark.parametrize(("harm", "words"), HARMS.values(), ids=HARMS.keys())
def test_what_is_taken_from_a_run_is_noticed_and_put_back(
    trainer: Any, finished: Callable, disturb: Callable, harm: Callable[[Path], Any], words: str, request: Any
) -> None:
    """The step is saved, the records are whole, and the same command continues to what an undisturbed run is."""
    name = f"disturbed_{request.node.callspec.id}"
    settings = ("logging.interval=1", *WITHOUT_CHECKPOINTS)
    undisturbed = finished("undisturbed", *settings)
    disturb(2, harm)
    outcome = trainer.here(f"name={name}", *settings)
    folder = trainer.root / name
    assert outcome.code == EXIT_USER_ERROR
    assert f"{words}" in outcome.sentence and f"step 2 is saved in {folder}" in outcome.sentence
    assert outcome.errors.count("error:") == 1 and "Traceback" not in outcome.errors
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    kept = sorted(path for path in folder.glob("*.jsonl") if path.read_text().startswith("{"))
    steps = [json.loads(line)["step"] for path in kept for line in path.read_text().splitlines()]
    assert {step for step in steps if step} == {1, 2}
    configurations = [path.read_text() for path in folder.glob("config*.yaml")]
    assert any("training:" in text for text in configurations)
    disturb(-1, harm)
    again = trainer.here(f"name={name}", *settings)
    assert again.code == 0, again.errors
    assert digest(folder) == digest(trainer.root / undisturbed)


def test_folder_that_is_another_is_left_alone(trainer: Any, disturb: Callable) -> None:
    def exchange(run: Path) -> None:
        run.rename(run.with_name("exchanged_before"))
        run.mkdir()
        (run / "theirs").write_text("")

    disturb(2, exchange)
    outcome = trainer.here("name=exchanged", "logging.interval=1", *WITHOUT_CHECKPOINTS)
    assert outcome.code == EXIT_USER_ERROR
    assert f"{trainer.root / 'exchanged'} was replaced by another while the run trained" in outcome.sentence
    assert [path.name for path in (trainer.root / "exchanged").iterdir()] == ["theirs"]
    records = trainer.records("exchanged_before")
    assert [record["step"] for record in records if "train/loss" in record] == [1]


def test_file_that_was_cut_cannot_be_put_back(trainer: Any, disturb: Callable) -> None:
    disturb(2, lambda run: cut(run / "metrics.jsonl"))
    outcome = trainer.here("name=cut", "logging.interval=1", *WITHOUT_CHECKPOINTS)
    assert outcome.code == EXIT_USER_ERROR and "metrics.jsonl was cut while the run trained" in outcome.sentence
    assert (trainer.root / "cut" / "checkpoints" / "step_00000002").is_dir()


def test_folder_removed_after_the_last_step_is_no_finished_run(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Loop._finish_checkpoint

    def removed(loop: Loop) -> None:
        finish(loop)
        monkeypatch.setattr(Loop, "_finish_checkpoint", finish)
        shutil.rmtree(loop.live.folder)

    monkeypatch.setattr(Loop, "_finish_checkpoint", removed)
    outcome = trainer.here("name=removed_at_the_end", *WITHOUT_CHECKPOINTS)
    folder = trainer.root / "removed_at_the_end"
    assert outcome.code == EXIT_USER_ERROR and f"{folder} was removed while the run trained" in outcome.sentence
    assert "finished:" not in outcome.output and (folder / "checkpoints" / "step_00000004").is_dir()
    assert len(trainer.records("removed_at_the_end")) >= 4


def test_records_of_a_run_whose_checkpoints_are_gone_are_kept(trainer: Any, finished: Callable) -> None:
    finished("gone")
    folder = trainer.root / "gone"
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"status": "interrupted"}))
    before = (folder / "metrics.jsonl").read_text()
    shutil.rmtree(folder / "checkpoints")
    outcome = trainer.here("name=gone")
    assert outcome.code == 0
    kept = folder / "metrics.kept_1.jsonl"
    words = f"warning: {folder} was trained to step 4, and it has no checkpoint: the run begins again at step 0"
    assert words in outcome.unfolded and str(kept) in outcome.output
    assert kept.read_text() == before
    assert [record["step"] for record in trainer.records("gone")] == [
        json.loads(line)["step"] for line in before.splitlines()
    ]


def test_records_beyond_a_newest_checkpoint_that_is_gone_are_kept(trainer: Any, finished: Callable) -> None:
    finished("newest_gone")
    folder = trainer.root / "newest_gone"
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"status": "interrupted"}))
    before = (folder / "metrics.jsonl").read_text()
    gone = folder / "checkpoints" / "step_00000004"
    shutil.rmtree(gone)
    outcome = trainer.here("name=newest_gone")
    assert outcome.code == 0
    assert f"{gone}, which its records go on from, is not there: the run begins again at step 2" in outcome.unfolded
    assert (folder / "metrics.kept_1.jsonl").read_text() == before


def test_start_before_the_first_record_keeps_nothing(trainer: Any) -> None:
    assert trainer.here("name=quiet", "training.steps=1").code == 0
    assert not list((trainer.root / "quiet").glob("*kept*"))

"""Post-training: a dense model that goes on with a separator pattern wins back what the pattern costs it.

One dense model of two layers is trained, goes on under a pattern and, beside it, as it was, for a tenth of its steps.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from sepllm_train.analysis.recovery import recovery
from sepllm_train.cli.pretrain import pretrain
from sepllm_train.config.load import config_folder, register_schema, to_config
from sepllm_train.runs.evaluate import evaluate_run
from sepllm_train.runs.open import open_run
from tests.support.command import command

recovery_main = command("analyze recovery")

# The three runs take half a minute of a core.
pytestmark = pytest.mark.slow
STEPS, MORE = 400, 40
MODEL = [
    "+experiment=demo_dense",
    "seed=2",
    "model.layers=2",
    "model.hidden=64",
    "model.heads=2",
    "model.ffn=256",
    "model.rotary_fraction=1",
    "data.sample_vocabulary=512",
    "data.sequence_length=256",
    "data.workers=0",
    "optim=wsd",
    "optim.lr=1e-2",
    "optim.min_lr=1e-3",
    f"optim.schedule_steps={STEPS + MORE}",
    "training.global_batch=6",
    "training.micro_batch=6",
    "training.validation_samples=48",
    "training.validation_interval=0",
    "training.checkpoint_interval=10000",
    "logging.interval=100",
]
SEPARATORS = ["attention=sep", "attention.window=3", "attention.separators=[period]"]


@dataclass(frozen=True)
class PostTraining:
    """Runs of the tests below, made by the trainer in this process: starting it anew costs seconds each time."""

    root: Path

    def train(self, name: str, *overrides: str) -> Path:
        """Train to the end; gives the folder."""
        register_schema()
        folders = [f"run_root={self.root}", f"data.cache={self.root / 'cache'}", f"name={name}"]
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            config = to_config(compose("pretrain", overrides=[*MODEL, *folders, *overrides]))
        pretrain(config)
        return self.root / name

    def go_on(self, name: str, *overrides: str) -> Path:
        """Train on from the dense model by its schedule."""
        start = [f"init_from={self.root / 'dense'}", f"optim.schedule_start={STEPS}", f"training.steps={MORE}"]
        return self.train(name, *start, *overrides)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTraining]:
    """dense; post, which goes on under the pattern; continued, which goes on without."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = PostTraining(tmp_path_factory.mktemp("recovery"))
    runs.train("dense", f"training.steps={STEPS}")
    runs.go_on("post", *SEPARATORS, "training.validation_interval=20")
    runs.go_on("continued")
    yield runs
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def report(runs: PostTraining) -> Path:
    """Folder of the report on post beside continued."""
    folder = runs.root / "report"
    options = ["--continued", str(runs.root / "continued"), "--windows", "3,8", "--output", str(folder)]
    assert recovery_main([str(runs.root / "post"), *options]) == 0
    return folder


def read(folder: Path) -> dict[str, Any]:
    """recovery.json."""
    return dict(json.loads((folder / "recovery.json").read_text()))


def test_a_tenth_of_the_steps_recovers_the_gap(report: Path) -> None:
    (row,) = read(report)["runs"]
    assert row["steps_share"] <= 0.1 and row["tokens_share"] <= 0.1
    assert row["gap"]["mean"] > 0.1
    assert row["recovered"]["mean"] >= 0.9
    # Part of that is the learning rate that comes down: of the way to the dense model trained on it is less.
    assert 0.5 < row["recovered_of_continued"]["mean"] < row["recovered"]["mean"]


def test_report(runs: PostTraining, report: Path) -> None:
    result = read(report)
    (row,) = result["runs"]
    assert result["samples"] == 48 and result["caveats"] == []
    # before is what the run was validated at before its first step.
    logged = [json.loads(line) for line in (runs.root / "post" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["val/loss"] for record in logged if "val/loss" in record]
    assert row["before"]["mean"] == pytest.approx(losses[0], rel=1e-6)
    assert row["after"]["mean"] == pytest.approx(losses[-1], rel=1e-6)
    for key, name in (("dense", "dense"), ("continued", "continued")):
        found = evaluate_run(open_run(runs.root / name), samples=48)
        assert row[key]["mean"] == pytest.approx(found["loss"], rel=1e-9)
    assert row["gap"]["mean"] == pytest.approx(row["before"]["mean"] - row["dense"]["mean"], rel=1e-6)
    assert row["curve"]["steps"] == [0, 20, 40] and row["curve"]["recovered"][0] == 0
    assert row["curve"]["recovered"][-1] == pytest.approx(row["recovered"]["mean"], rel=1e-4)
    own, wider = row["windows"]
    assert (own["window"], wider["window"]) == (3, 8)
    assert {key: own[key] for key in ("before", "after", "recovered")} == {
        key: row[key] for key in ("before", "after", "recovered")
    }
    assert 0 < wider["gap"]["mean"] < own["gap"]["mean"] and wider["dense"] == row["dense"]
    assert row["source"]["step"] == row["source_steps"] == STEPS and row["step"] == MORE
    markdown = (report / "recovery.md").read_text()
    assert f"{row['recovered']['mean']:.1%} ± {row['recovered']['error']:.1%}" in markdown
    assert "| post, n = 8 |" in markdown and "Beside continued" in markdown
    files = {"recovery.json", "recovery.md", "recovered_by_step.svg"}
    assert {path.name for path in report.iterdir()} == files


def test_no_share_without_a_gap(runs: PostTraining, tmp_path: Path, capsys: Any) -> None:
    """Dense weights under a dense pattern, and one sample, which has no error."""
    assert recovery_main([str(runs.root / "continued"), "--samples", "2", "--output", str(tmp_path)]) == 0
    (row,) = read(tmp_path)["runs"]
    assert row["gap"]["mean"] == 0 and row["recovered"] is None and row["curve"] is None
    assert "continued: no share can be given" in (tmp_path / "recovery.md").read_text()
    assert not list(tmp_path.glob("*.svg"))
    capsys.readouterr()
    assert recovery_main([str(runs.root / "post"), "--samples", "1"]) == 0
    assert "post: no share can be given" in capsys.readouterr().out


def test_source_that_was_moved(runs: PostTraining, tmp_path: Path, capsys: Any) -> None:
    post, dense, moved = (runs.root / name for name in ("post", "dense", "dense_moved"))
    dense.rename(moved)
    try:
        refused([str(post)], f"began with step 400 of {dense}/checkpoints/step_00000400, and", capsys)
        for source in (moved, moved / "checkpoints" / "step_00000400"):
            output = tmp_path / source.name
            assert recovery_main([str(post), "--source", str(source), "--samples", "1", "--output", str(output)]) == 0
            assert read(output)["runs"][0]["source"]["checkpoint"] == str(moved / "checkpoints" / "step_00000400")
        refused([str(post), "--source", str(runs.root / "continued")], "step_00000400 is not there", capsys)
        another = runs.root / "continued" / "checkpoints" / "step_00000040"
        refused([str(post), "--source", str(another)], f"{another} is not the checkpoint that {post} began", capsys)
    finally:
        moved.rename(dense)


def test_run_that_does_not_tell_its_source(runs: PostTraining, tmp_path: Path, capsys: Any) -> None:
    """run.json of before: init_from names the source, whose newest checkpoint is taken."""
    post = tmp_path / "earlier"
    shutil.copytree(runs.root / "post", post)
    told = json.loads((post / "run.json").read_text())
    del told["initial_weights"]
    (post / "run.json").write_text(json.dumps(told))
    assert recovery_main([str(post), "--samples", "2", "--output", str(tmp_path / "report")]) == 0
    result = read(tmp_path / "report")
    assert result["runs"][0]["source"]["step"] == STEPS and "does not tell the checkpoint" in result["caveats"][0]
    refused([str(post), "--source", str(tmp_path / "nowhere")], "which is not there: give its place by --s", capsys)


def test_runs_that_do_not_compare(runs: PostTraining, capsys: Any) -> None:
    post = str(runs.root / "post")
    short = runs.go_on("post_short", "training.steps=2")
    words = f"was trained on {2 * 6 * 256:,} tokens and {post} on {MORE * 6 * 256:,}"
    refused([post, "--continued", str(short)], words, capsys)
    refused([post, "--continued", post], "has another attention pattern than its source", capsys)
    other = runs.go_on("post_other", *SEPARATORS, "training.steps=2", "data.validation_fraction=0.05")
    refused([post, str(other)], f"{other} and {post} have different data.validation_fraction", capsys)
    refused([str(other)], "have different data.validation_fraction, so other text was held out", capsys)
    again = runs.train("post_again", *SEPARATORS, f"init_from={short}", "training.steps=2")
    refused([str(again), "--continued", str(short)], "they must begin with the same checkpoint", capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{root}/dense"], "dense did not begin with the weights of another run"),
        (["{root}/nowhere"], "config.yaml does not exist: give the folder of a run"),
        (["{root}/post", "{root}/dense/../post"], "name each run once"),
        (["{root}/post", "--samples", "0"], "--samples 0 must be at least 1"),
        (["{root}/post", "--windows", "4,0"], "--windows 0: a window counts the token itself"),
        (["{root}/post", "--output", "{root}/post/run.json"], "run.json is a file: name a folder"),
    ],
)
def test_recovery_mistake(runs: PostTraining, arguments: list[str], words: str, capsys: Any) -> None:
    refused([part.format(root=runs.root) for part in arguments], words, capsys)


def refused(arguments: list[str], words: str, capsys: Any) -> None:
    """The command ends with code 2 and one sentence that has these words."""
    assert recovery_main(arguments) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("error: ") and words in sentence, sentence


def test_share_and_its_error() -> None:
    """Two samples, worked out by hand: gaps 1 and 3, gains 0.5 and 2.5."""
    dense = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    before = dense + torch.tensor([[0.5, 1.5], [3.0, 3.0]])
    after = before - torch.tensor([[0.5, 0.5], [2.0, 3.0]])
    row = recovery(dense, before, after)
    assert row["gap"] == (2, 1) and row["left"].mean == 0.5
    # The gap is not above twice its error.
    assert row["recovered"] is None
    found = recovery(dense, before + 9, after + 9)["recovered"]
    assert found is not None and found.mean == pytest.approx(3 / 22)
    residuals = [0.5 - 3 / 22 * 10, 2.5 - 3 / 22 * 12]
    assert found.error == pytest.approx(math.sqrt(2 * sum(r**2 for r in residuals)) / 22)
    # A pattern that the dense weights are better under has nothing to recover.
    assert recovery(before + 9, dense, after)["recovered"] is None
    beside = recovery(dense, before + 9, after + 9, continued=dense - 1)
    assert beside["recovered_of_continued"].mean == pytest.approx(3 / 24)
    assert beside["left_of_continued"].mean == pytest.approx(9 + 0.5 + 1)


def test_a_run_of_other_positions_is_refused(runs: PostTraining, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights of its source would be evaluated at them too."""
    folder = runs.go_on("other_base", "model.rotary_base=20000", "training.steps=1")
    assert recovery_main([str(folder)]) == 2
    assert "has another model.rotary_base than its source" in capsys.readouterr().err


def test_losses_that_do_not_count_are_left_out() -> None:
    dense, before, after, beside = torch.rand(4, 3, 8, generator=torch.Generator().manual_seed(0)).double()
    counted = torch.arange(8).expand(3, 8) % 4 != 3
    before, after = before + 5, after + 3
    found = recovery(dense, before, after, beside, counted=counted)
    kept = [losses[counted].view(3, -1) for losses in (dense, before, after, beside)]
    for name, value in recovery(*kept).items():
        assert found[name] == pytest.approx(value, rel=1e-12), name
    assert found["dense"] != pytest.approx(recovery(dense, before, after, beside)["dense"], rel=1e-6)

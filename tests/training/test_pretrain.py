"""scripts/pretrain.py from the command line: what it writes, layouts, schedules, resume."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from sepllm_train.base.errors import EXIT_BAD_STEPS, EXIT_INTERRUPTED
from sepllm_train.config.load import configuration_of
from sepllm_train.metrics.flops import FlopsCounter, ModelShape
from sepllm_train.training.checkpoint import digest, digests
from sepllm_train.training.forecast import checkpoint_bytes
from sepllm_train.training.loop import Loop
from sepllm_train.training.setup import build_scheduler, learning_rate
from tests.support.command import command
from tests.support.small_run import SMALL_RUN

COUNTERS = {"step", "tokens", "seconds", "flops/model", "flops/dense", "flops/paper"}


def test_what_a_run_writes(trainer: Any, finished: Callable) -> None:
    name = finished("one")
    folder = trainer.root / name
    records = trainer.records(name)
    assert all(record.keys() >= COUNTERS for record in records)
    assert [r["step"] for r in records if "train/loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in records if "val/loss" in r] == [0, 2, 4]
    assert records[-1]["tokens"] == 4 * 4 * 128
    assert 0 < records[0]["val/bits_per_byte"] < 10
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished" and run["comparable"]["vocabulary"] == 4096
    assert yaml.safe_load((folder / "config.yaml").read_text())["training"]["steps"] == 4
    assert json.loads((folder / "environment.json").read_text())["packages"]["megatron-core"] == version(
        "megatron-core"
    )
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["latest", "step_00000002", "step_00000004"]
    assert not list(folder.rglob("*.partial"))


def test_loss_starts_uniform_and_falls(trainer: Any, finished: Callable) -> None:
    losses = trainer.values(finished("one"), "train/loss")
    assert abs(losses[0] - math.log(4096)) < 0.7
    assert losses[-1] < losses[0]


def test_flops_follow_from_the_attended_share(trainer: Any, finished: Callable) -> None:
    shape = ModelShape(layers=2, hidden=64, ffn=128, heads=4, kv_heads=4, head_dim=16, vocabulary=4096, gated=False)
    last = trainer.records(finished("one"))[-1]
    shares = trainer.values("one", "train/attended_share")
    pairs = sum(round(share * 2 * 4 * 128 * 129 / 2) for share in shares)
    for key, value in FlopsCounter(shape, 128).training(last["tokens"], pairs).items():
        assert last[key] == pytest.approx(value, rel=1e-9)
    assert last["flops/model"] < last["flops/dense"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("tensor2", ["parallel.tensor=2"]),
        pytest.param("pipeline2", ["parallel.pipeline=2"], marks=pytest.mark.slow),
        pytest.param("data2", [], marks=pytest.mark.slow),
    ],
)
def test_layouts_agree_with_one_process(trainer: Any, finished: Callable, name: str, overrides: list[str]) -> None:
    """What is read and written in two processes is that of one; tests/model/test_layouts.py has every layout."""
    one, other = finished("one"), finished(name, *overrides, processes=2)
    for key in ("train/loss", "val/loss", "val/bits_per_byte", "train/attended_share", "flops/model"):
        np.testing.assert_allclose(trainer.values(other, key), trainer.values(one, key), rtol=1e-4, err_msg=key)


LARGE = (
    "model=pythia14m",
    "model.vocabulary=50304",
    "data.sequence_length=128",
    "data.workers=0",
    "training.steps=5",
    "training.global_batch=2",
    "training.micro_batch=2",
    "training.validation_interval=0",
    "training.validation_samples=0",
    "training.checkpoint_interval=0",
    "logging.interval=1",
)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("large_tensor2", ["parallel.tensor=2"]),
        ("large_pipeline2", ["parallel.pipeline=2"]),
        ("large_sharded2", ["parallel.sharded_optimizer=true", "training.micro_batch=1"]),
    ],
)
def test_gradient_norms_of_large_matrices_do_not_depend_on_the_layout(
    trainer: Any, finished: Callable, name: str, overrides: list[str]
) -> None:
    """The gradient of an embedding of 6.4 million elements is where sums in single precision show."""
    one = finished("large_one", *LARGE)
    other = finished(name, *LARGE, *overrides, processes=2)
    for key in ("train/loss", "train/grad_norm"):
        np.testing.assert_allclose(trainer.values(other, key), trainer.values(one, key), rtol=2e-6, err_msg=key)
    assert len(trainer.values(one, "train/grad_norm")) == 5


@pytest.mark.distributed
@pytest.mark.slow
def test_counts_do_not_depend_on_the_layout(
    trainer: Any, finished: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """4,100 entries are padded to 4,352 in two tensor-parallel processes and to 4,224 in one: no part of the model."""
    entries = "model.vocabulary=4100"
    finished("entries_tensor2", entries, "parallel.tensor=2", processes=2)
    middle = trainer.root / "entries_tensor2" / "checkpoints" / "step_00000002"
    finished("entries_crossed", entries, f"resume={middle}")
    finished("entries_one", entries)
    names = ("entries_tensor2", "entries_crossed", "entries_one")
    runs = [json.loads((trainer.root / name / "run.json").read_text()) for name in names]
    assert {run["parameters"] for run in runs} == {2 * 64 * 4100 + 67072}
    assert len({tuple(run["flops_per_token"].items()) for run in runs}) == 1
    records = [record for name in names for record in trainer.records(name) if record["tokens"]]
    forward = 2 * 2 * (4 * 64 * 64 + 2 * 64 * 128) + 2 * 64 * 4100 + 2 * 2 * 64 * 129
    assert {record["flops/dense"] / record["tokens"] for record in records} == {3 * forward}
    assert len({(record["step"], record["flops/model"]) for record in records}) == 4
    folders = [str(trainer.root / name) for name in names]
    assert command("compare")([*folders, "--output", str(tmp_path / "compared"), "--no-groups"]) == 0
    assert "different sizes" not in "".join(capsys.readouterr())


def test_dense_and_sep_read_the_same_tokens(trainer: Any, finished: Callable) -> None:
    dense = finished("dense", "attention=dense")
    assert set(trainer.values(dense, "train/attended_share")) == {1.0}
    data = [json.loads((trainer.root / n / "run.json").read_text())["comparable"] for n in (dense, finished("one"))]
    assert data[0] == data[1]
    # Before the first step both models have the same weights; only the mask tells them apart.
    first = [trainer.records(name)[0]["val/loss"] for name in (dense, "one")]
    assert first[0] != first[1] and abs(first[0] - first[1]) < 0.05


def test_resume_is_bitwise(trainer: Any, finished: Callable) -> None:
    """Four steps are the two steps, a new process, and the other two."""
    finished("one")
    source = trainer.root / "one" / "checkpoints"
    assert trainer("name=again", f"resume={source / 'step_00000002'}").code == 0
    again = trainer.root / "again" / "checkpoints" / "step_00000004"
    whole = dict(digests(source / "step_00000004"))
    assert len(whole) > 50 and {"rng.cpu", "optimizer.step", "state.pairs"} < whole.keys()
    assert dict(digests(again)) == whole
    assert digest(again) == digest(source / "step_00000004") != digest(source / "step_00000002")
    assert trainer.values("again", "train/loss") == trainer.values("one", "train/loss")[2:]
    assert trainer.records("again")[-1]["flops/model"] == trainer.records("one")[-1]["flops/model"]


def test_resume_auto_continues_a_killed_run(trainer: Any, finished: Callable) -> None:
    """A run that died after its first checkpoint, with lines beyond it and a torn last line in metrics.jsonl."""
    finished("one")
    killed = trainer.root / "killed"
    steps = trainer.root / "one" / "checkpoints"
    (killed / "checkpoints").mkdir(parents=True)
    for file in (steps / "step_00000002").iterdir():
        (killed / "checkpoints" / "step_00000002").mkdir(exist_ok=True)
        (killed / "checkpoints" / "step_00000002" / file.name).write_bytes(file.read_bytes())
    (killed / "checkpoints" / "step_00000004.partial").mkdir()
    lines = (trainer.root / "one" / "metrics.jsonl").read_text().splitlines(keepends=True)
    beyond = next(n for n, line in enumerate(lines) if json.loads(line)["step"] == 3)
    (killed / "metrics.jsonl").write_text("".join(lines[: beyond + 1]) + '{"step": 4, "tok')
    outcome = trainer("name=killed")
    assert outcome.code == 0 and "resumed from" in outcome.output
    assert [r["step"] for r in trainer.records("killed")] == [r["step"] for r in trainer.records("one")]
    assert trainer.values("killed", "train/loss") == trainer.values("one", "train/loss")


def test_stopped_before_its_first_step(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is saved, and nothing is said to be; the same command starts the run."""
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_agree_to_stop", lambda loop: setattr(loop, "stopping", True))
        outcome = trainer.here("name=stopped_early", "training.steps=1")
    assert outcome.code == EXIT_INTERRUPTED
    assert "stopped the run before step 1 of 1, so there was nothing to save" in outcome.sentence
    assert json.loads((trainer.root / "stopped_early" / "run.json").read_text())["status"] == "interrupted"
    assert not list((trainer.root / "stopped_early").glob("checkpoints/*"))
    assert trainer.here("name=stopped_early", "training.steps=1").code == 0


def test_run_that_came_to_nothing_is_not_finished(trainer: Any) -> None:
    """Its one step is used, and leaves weights that no loss can be computed from."""
    spoiling = ("optim.lr=1e30", "optim.min_lr=0", "optim.warmup_steps=0")
    outcome = trainer.here("name=spoiled", "training.steps=1", "training.validation_interval=0", *spoiling)
    assert outcome.code == EXIT_BAD_STEPS
    assert outcome.sentence.startswith("error: the validation loss after the last step is nan")
    assert json.loads((trainer.root / "spoiled" / "run.json").read_text())["status"] == "failed"
    assert not list((trainer.root / "spoiled").glob("checkpoints/step_????????"))


def rates_of(*overrides: str) -> list[float]:
    """Learning rates of the steps of the small run, from its schedule alone."""
    config = configuration_of([*SMALL_RUN, *overrides])
    optimizer = torch.optim.SGD([torch.zeros(1)])
    scheduler = build_scheduler(config, optimizer)  # type: ignore[arg-type]
    rates = []
    for _ in range(config.training.steps):
        rates.append(learning_rate(scheduler))
        scheduler.step(increment=1)
    return rates


@pytest.mark.parametrize("schedule", ["wsd", "linear", "constant", "cosine"])
def test_schedules(schedule: str) -> None:
    top, low = 2e-3, 2e-4
    expected = {
        "constant": [0.0, top, top, top],
        "linear": [0.0, top, top - (top - low) / 3, top - 2 * (top - low) / 3],
        "wsd": [0.0, top, top, (top + low) / 2],
        "cosine": [0.0, top, low + 3 / 4 * (top - low), low + 1 / 4 * (top - low)],
    }
    rates = rates_of(f"optim.schedule={schedule}", "optim.warmup_steps=1", "optim.decay_fraction=0.5")
    np.testing.assert_allclose(rates, expected[schedule], rtol=1e-6)


def test_a_run_trains_at_the_rates_of_its_schedule(trainer: Any, finished: Callable) -> None:
    rates = trainer.values(finished("one"), "train/lr")
    assert len(set(rates)) == 4 and rates == rates_of()


def test_listed_steps_are_saved_and_kept(trainer: Any) -> None:
    """Step 0 too, which a run can continue from as from any other."""
    options = ("name=listed", "training.checkpoint_steps=[0,1]", "training.keep_checkpoints=1")
    assert trainer.here(*options, "training.checkpoint_interval=3").code == 0
    folder = trainer.root / "listed" / "checkpoints"
    assert sorted(path.name for path in folder.glob("step_*")) == [f"step_{step:08d}" for step in (0, 1, 4)]
    whole = trainer.values("listed", "train/loss")
    again = trainer.here("name=from_0", f"resume={folder / 'step_00000000'}", "training.checkpoint_steps=[0]")
    assert again.code == 0 and trainer.values("from_0", "train/loss") == whole
    beyond = trainer.here("name=beyond", "training.checkpoint_steps=[0,5]")
    assert beyond.code == 2 and "has 5, beyond training.steps=4" in beyond.sentence


def test_bf16_follows_fp32(trainer: Any, finished: Callable) -> None:
    one = trainer.values(finished("one"), "train/loss")
    losses = trainer.values(finished("bf16", "training.precision=bf16", "training.checkpoint_interval=0"), "train/loss")
    np.testing.assert_allclose(losses, one, atol=0.02)


def test_fp16_trains_and_resumes_across_skipped_steps(trainer: Any, finished: Callable) -> None:
    """A loss scale of 2**16 overflows at first; the schedule does not depend on how often."""
    finished("fp16", "training.precision=fp16", "training.steps=8", "training.checkpoint_interval=4")
    losses, rates = (trainer.values("fp16", key) for key in ("train/loss", "train/lr"))
    assert losses[-1] < losses[0] - 0.2
    source = trainer.root / "fp16" / "checkpoints" / "step_00000004"
    resumed = trainer.here("name=fp16_again", f"resume={source}", "training.precision=fp16", "training.steps=8")
    assert resumed.code == 0, resumed.errors[-2000:]
    assert trainer.values("fp16_again", "train/lr") == rates[4:]
    assert trainer.values("fp16_again", "train/loss") == losses[4:]


@pytest.mark.distributed
@pytest.mark.slow
def test_blend_is_validated_per_dataset_whatever_the_layout(
    trainer: Any, finished: Callable, sample_prefix: Path, tmp_path: Path
) -> None:
    """Three validation samples do not fill the micro-batches of two replicas: what fills them must not count."""
    copy = tmp_path / "copy"
    for file in sample_prefix.parent.iterdir():
        if file.name.startswith(f"{sample_prefix.name}."):
            (tmp_path / file.name.replace(sample_prefix.name, "copy", 1)).write_bytes(file.read_bytes())
    blend = f"data.prefixes=[{{path: {sample_prefix}, weight: 0.7}}, {{path: {copy}, weight: 0.3}}]"
    options = ["data=prefixes", blend, "training.validation_samples=3", "data.workers=1", "training.deterministic=true"]
    one, two = finished("blend", *options, processes=1), finished("blend2", *options, processes=2)
    for key in ("val/docs/loss", "val/copy/loss", "val/loss", "val/docs/bits_per_byte", "train/loss"):
        np.testing.assert_allclose(trainer.values(two, key), trainer.values(one, key), rtol=1e-5, err_msg=key)
    assert trainer.values(one, "val/docs/loss") == trainer.values(one, "val/copy/loss")


def test_llama_family_trains(trainer: Any, finished: Callable) -> None:
    losses = trainer.values(
        finished("llama", "model=llama_demo", "model.kv_heads=2", "attention.sink=learned", "attention.qk_norm=true"),
        "train/loss",
    )
    assert losses[-1] < losses[0]


def test_dry_run_trains_nothing(trainer: Any) -> None:
    outcome = trainer.here("name=dry", "dry_run=true", "parallel.tensor=2")
    assert outcome.code == 0
    for words in (
        "parameters",
        "FLOPs per token",
        "memory per process",
        "backend",
        "tokens a step",
        "dry run",
        "held out",
        "passes over",
        "GiB free on this machine for each",
        "checkpoints: 0.",
        "time: at least ",
    ):
        assert words in outcome.output
    assert not (trainer.root / "dry").exists()


def test_dry_run_says_when_the_run_does_not_fit_this_machine(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepllm_train.training.forecast.free_memory", lambda device: 1 << 20)
    outcome = trainer.here("name=dry", "dry_run=true")
    told = " ".join(outcome.output.split())
    assert outcome.code == 0 and re.search(
        r"warning: memory: [\d.]+ GiB needed .* and 0\.00 GiB free .*: .*smaller", told
    )
    assert "passed, but it does not fit this machine; nothing was trained." in told
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    told = " ".join(trainer.here("name=dry", "dry_run=true").output.split())
    assert "warning: checkpoints: " in told and "choose another run_root=" in told and "does not fit" in told


def test_a_dry_run_under_the_name_of_a_finished_run(trainer: Any, finished: Any) -> None:
    finished("dense", "attention=dense")
    before = sorted(path.name for path in trainer.root.iterdir())
    outcome = trainer.here("name=dense", "dry_run=true", "model.layers=1")
    folder, told = trainer.root / "dense", " ".join(outcome.output.split())
    assert outcome.code == 0, outcome.output
    assert (
        f"note: {folder} holds a finished run: choose another name=, or train on with resume={folder} name=NEW" in told
    )
    assert "passed" in told and sorted(path.name for path in trainer.root.iterdir()) == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_dry_run_knows_the_size_of_a_checkpoint(trainer: Any, precision: str) -> None:
    name = f"size_{precision}"
    outcome = trainer.here(f"name={name}", f"training.precision={precision}")
    assert outcome.code == 0
    parameters = json.loads((trainer.root / name / "run.json").read_text())["parameters"]
    newest = trainer.root / name / "checkpoints" / "step_00000004"
    written = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    asked = configuration_of([*SMALL_RUN, f"training.precision={precision}"])
    assert written == pytest.approx(checkpoint_bytes(asked, parameters), rel=0.15)


def test_secrets_of_the_command_line_are_in_no_record(trainer: Any) -> None:
    """config.yaml alone holds what was set, for the user to read."""
    settings = ("logging=tensorboard", "logging.entity=https://me:hunter2@host", "logging.tags=[api_key=hunter2]")
    outcome = trainer.here("name=masked", *settings)
    assert outcome.code == 0, outcome.errors
    folder = trainer.root / "masked"
    holding = [path for path in folder.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert holding == [folder / "config.yaml"] and "hunter2" not in outcome.output + outcome.errors
    command = json.loads((folder / "environment.json").read_text())["command"]
    assert {"logging.entity=https://me:***@host", "logging.tags=[api_key=***]"} <= set(command)
    assert [(folder / name).stat().st_mode & 0o777 for name in ("config.yaml", "environment.json")] == [0o600, 0o600]

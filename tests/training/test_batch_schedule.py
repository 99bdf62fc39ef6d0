"""A batch that grows over a run: what is trained, read, counted, resumed and refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sepllm_train.base.console import duration
from sepllm_train.base.errors import UserError
from sepllm_train.config.curriculum import Phase, phases_of
from sepllm_train.config.load import configuration_of
from sepllm_train.config.schema import Config, OptimConfig, ParallelConfig, TrainingConfig
from sepllm_train.config.validate import validate
from sepllm_train.data.corpus import open_corpus
from sepllm_train.data.loader import MicroBatchSampler, micro_batches
from sepllm_train.data.splits import build_datasets
from sepllm_train.distributed.launch import ALONE, process_grid, reading_group
from sepllm_train.training import step_logger
from sepllm_train.training.checkpoint import check_identity, digest, identity
from sepllm_train.training.schedules import schedule_of
from sepllm_train.training.setup import build_training, learning_rate, set_schedule
from tests.support.small_run import SMALL_MODEL
from tests.training.batch_schedule_worker import train_and_count
from tests.training.checkpoints import VOCABULARY, config_of


def config_with(schedule: list[Any], parallel: ParallelConfig | None = None, **training: Any) -> Config:
    """Ten steps, at last of 16 sequences of 2,048 tokens."""
    settings = {"steps": 10, "global_batch": 16, "micro_batch": 2} | training
    return Config(training=TrainingConfig(batch_schedule=schedule, **settings), parallel=parallel or ParallelConfig())


# Three steps of 4, of which two hold 8 samples, and two of 8.
GROWING = [{"batch": 4, "samples": 9}, {"batch": 8, "tokens": 16 * 2048}]
BATCHES = [4, 4, 4, 8, 8, 16, 16, 16, 16, 16]


def test_phases_are_rounded_up_to_whole_steps() -> None:
    config = config_with(GROWING)
    validate(config, 2)
    assert phases_of(config) == [Phase(2048, 1, 3, 4), Phase(2048, 4, 5, 8), Phase(2048, 6, 10, 16)]
    schedule = schedule_of(config)
    assert [schedule.phase(step).batch for step in range(1, 11)] == BATCHES
    assert [schedule.samples(step) for step in range(11)] == [0, *accumulate(BATCHES)]
    assert schedule.samples(12) == sum(BATCHES) + 32, "a timed run may take more steps"


def test_a_curriculum_keeps_its_steps_beside_it() -> None:
    config = config_with(GROWING, curriculum=[{"length": 512, "steps": 4}])
    validate(config, 1)
    assert phases_of(config) == [
        Phase(512, 1, 3, 4),
        Phase(512, 4, 4, 8),
        Phase(2048, 5, 5, 8),
        Phase(2048, 6, 10, 16),
    ]


@pytest.mark.parametrize("samples", [1, 159, 160])
def test_steps_of_the_whole_batch_are_no_phase(samples: int) -> None:
    config = config_with([{"batch": 16, "samples": samples}])
    validate(config, 1)
    assert phases_of(config) == [Phase(2048, 1, 10, 16)]


@pytest.mark.parametrize(
    "entry",
    [
        4,
        {"batch": 4},
        {"batch": 4, "samples": 8, "tokens": 8},
        {"batch": 4, "steps": 2},
        {"batch": 4, "samples": 0},
        {"batch": -4, "samples": 8},
        {"batch": 4, "samples": 0.5},
        {"batch": 4.0, "samples": 8},
        {"batch": True, "samples": 8},
        {"batch": "4", "samples": 8},
    ],
)
def test_entries_that_are_refused(entry: Any) -> None:
    with pytest.raises(UserError, match=re.escape(f"training.batch_schedule entry {entry} must be {{batch: SEQUENCES")):
        config_with([entry])


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ([{"batch": 8, "samples": 8}, {"batch": 4, "samples": 8}], "has the batches [8, 4]: they must rise"),
        ([{"batch": 8, "samples": 8}, {"batch": 8, "samples": 8}], "has the batches [8, 8]: they must rise"),
        (
            [{"batch": 32, "samples": 8}],
            "has the batches [32]: they must rise from phase to phase, to at most",
        ),
        ([{"batch": 4, "samples": 37}], "takes 10 steps, and training.steps=10 must leave some for training.global_b"),
        ([{"batch": 16, "samples": 161}], "takes 11 steps, and training.steps=10 must leave some"),
        ([{"batch": 4, "tokens": 10**30}], "and training.steps=10 must leave some"),
    ],
)
def test_schedules_that_are_refused(schedule: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        validate(config_with(schedule), 1)


ODD = [{"batch": 4, "samples": 8}, {"batch": 6, "samples": 8}, {"batch": 10, "samples": 8}]
INTERLEAVED = ParallelConfig(pipeline=2, virtual_pipeline=2)


@pytest.mark.parametrize(
    ("parallel", "world_size", "micro", "words"),
    [
        (
            ParallelConfig(),
            2,
            2,
            "batch=6 of training.batch_schedule (from step 3 on) must be a multiple of ",
        ),
        (
            ParallelConfig(),
            1,
            4,
            "batch=6 of training.batch_schedule (from step 3 on) must be a multiple of ",
        ),
        (
            INTERLEAVED,
            2,
            2,
            "parallel.virtual_pipeline=2 needs the 3 micro-batches of a step with batch=6 of training.batch_schedule "
            "(from step 3 on) to be a multiple of parallel.pipeline=2.",
        ),
    ],
)
def test_the_first_phase_that_a_layout_cannot_divide_is_named(
    parallel: ParallelConfig, world_size: int, micro: int, words: str
) -> None:
    validate(config_with(ODD), 1)
    with pytest.raises(UserError) as refused:
        validate(config_with(ODD, parallel, micro_batch=micro), world_size)
    assert str(refused.value).startswith(words)


def test_another_schedules_start_is_refused() -> None:
    config = replace(config_with(GROWING), optim=OptimConfig(schedule_start=5, schedule_steps=15), init_from="run")
    with pytest.raises(UserError, match="optim.schedule_start=5 counts steps of training.global_batch=16, and"):
        validate(config, 1)
    validate(replace(config, training=replace(config.training, batch_schedule=[])), 1)


def expected_rate(optim: OptimConfig, read: int, warmup: int, whole: int) -> float:
    """Learning rate after `read` samples of `whole`, with a warm-up of `warmup`."""
    top, low = optim.rates
    if warmup and read <= warmup:
        return top * read / warmup
    passed = (read - warmup) / (whole - warmup)
    if optim.schedule == "wsd":
        decay = round(optim.decay_fraction * whole)
        return top - (top - low) * max(0, read - whole + decay) / decay
    return {
        "constant": top,
        "linear": top - (top - low) * passed,
        "cosine": low + (top - low) / 2 * (1 + math.cos(math.pi * passed)),
        "pythia": max(low, top / 2 * (1 + math.cos(math.pi * min(read - warmup, whole - 2 * warmup) / whole))),
    }[optim.schedule]


@pytest.mark.parametrize("settings", [{"warmup_steps": 4}, {"warmup_fraction": 0.13}, {"schedule_steps": 30}])
def test_the_learning_rate_follows_the_samples_read(tmp_path: Path, settings: dict[str, Any]) -> None:
    growing = {"steps": 10, "global_batch": 16, "micro_batch": 2, "batch_schedule": GROWING}
    config = config_of(tmp_path, **growing)
    read = [0, *accumulate([*BATCHES, *[16] * 20])]
    whole = read[settings.get("schedule_steps", 10)]
    with process_grid(config, ALONE) as device:
        for schedule in ("cosine", "pythia", "linear", "wsd", "constant"):
            optim = OptimConfig(lr=3e-3, min_lr=1e-4, schedule=schedule, decay_fraction=0.3, **settings)
            warmup = read[4] if "warmup_steps" in settings else round(optim.warmup_fraction * whole)
            training = build_training(replace(config, optim=optim), VOCABULARY, device)
            for step in (*range(10), 3, 0):
                set_schedule(training, step)
                expected = expected_rate(optim, read[step], warmup, whole)
                assert learning_rate(training.scheduler) == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.fixture(scope="module")
def sample_dataset(sample_cache: Path) -> Any:
    """Training samples of 128 tokens."""
    config = configuration_of([*SMALL_MODEL, f"data.cache={sample_cache}"])
    with reading_group(ALONE):
        return build_datasets(config, open_corpus(config.data))[0]


@pytest.mark.parametrize(("replicas", "micro", "workers"), [(1, 4, 0), (2, 1, 0), (2, 2, 1)])
@pytest.mark.parametrize("first", [0, 2, 3, 7])
def test_a_step_reads_the_samples_after_those_of_all_steps_before(
    sample_dataset: Any, replicas: int, micro: int, workers: int, first: int
) -> None:
    schedule = schedule_of(config_with(GROWING))
    read = []
    for replica in range(replicas):
        samples = range(schedule.samples(first), schedule.samples(10))
        sampler = MicroBatchSampler(samples, micro_batch=micro, replica=replica, replicas=replicas)
        read.append(micro_batches(sample_dataset, sampler, workers=workers, device=torch.device("cpu")))
    begin = sum(BATCHES[:first])
    for batch in BATCHES[first:]:
        rows = [next(one)["tokens"] for _ in range(batch // (micro * replicas)) for one in read]
        expected = torch.stack([sample_dataset[number]["tokens"] for number in range(begin, begin + batch)])
        assert torch.equal(torch.cat(rows), expected)
        begin += batch
    assert all(next(one, None) is None for one in read)


SETTINGS: dict[str, Any] = {
    "training": {
        "steps": 5,
        "global_batch": 8,
        "batch_schedule": [{"batch": 2, "samples": 3}, {"batch": 4, "tokens": 4 * 64}],
        "validation_interval": 2,
        "validation_samples": 2,
        "keep_checkpoints": 5,
    },
}
RUN_BATCHES = [2, 2, 4, 8, 8]
LAYERS, HIDDEN, FFN, TABLE, LENGTH = 4, 32, 64, 4096, 64
# Shorter sequences in the first three steps: a phase of each batch and one of both.
WITH_CURRICULUM = {"training": {**SETTINGS["training"], "curriculum": [{"length": 16, "steps": 3}]}}


@pytest.fixture(scope="module")
def alone(sample_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of one process whose batch grows, those that go on from its checkpoints, and runs of one batch."""
    root = tmp_path_factory.mktemp("batches")
    runs = [{"name": "growing", **SETTINGS}]
    for step in (1, 2, 3, 4):
        checkpoint = str(root / "growing" / "checkpoints" / f"step_{step:08d}")
        runs.append({"name": f"after {step}", "resume": checkpoint, **SETTINGS})
    training = {"steps": 3, "validation_samples": 2, "keep_checkpoints": 3}
    runs.append({"name": "plain", "training": training})
    runs.append({"name": "whole", "training": {**training, "batch_schedule": [{"batch": 2, "tokens": 3 * 2 * 64}]}})
    found = train_and_count(str(root), str(sample_cache), runs, RUN_BATCHES, [LENGTH] * 5)
    for run in runs:
        found[run["name"]]["run"] = json.loads((root / run["name"] / "run.json").read_text())
    return found


def trained(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of training steps."""
    return [record for record in run["records"] if "train/loss" in record]


def test_steps_are_counted_with_their_batches(alone: dict[str, Any]) -> None:
    steps = trained(alone["growing"])
    assert [record["train/global_batch"] for record in steps] == RUN_BATCHES
    tokens = [LENGTH * read for read in accumulate(RUN_BATCHES)]
    assert [record["tokens"] for record in steps] == tokens
    for record, batch in zip(steps, RUN_BATCHES, strict=True):
        of_step = record["train/tokens_per_second"] * record["train/step_seconds"]
        assert of_step == pytest.approx(LENGTH * batch)
    weights = LAYERS * (4 * HIDDEN**2 + 2 * HIDDEN * FFN) + HIDDEN * TABLE
    pairs = accumulate(alone["pairs"])
    triangle = LAYERS * LENGTH * (LENGTH + 1) // 2
    for record, read, seen in zip(steps, accumulate(RUN_BATCHES), pairs, strict=True):
        assert record["flops/model"] == 3 * (2 * weights * LENGTH * read + 4 * HIDDEN * seen)
        assert record["flops/dense"] == 3 * (2 * weights * LENGTH * read + 4 * HIDDEN * triangle * read)
    run = alone["growing"]["run"]
    assert run["batch_schedule"] == [{"batch": 2, "steps": 2}, {"batch": 4, "steps": 1}]
    assert run["tokens"] == tokens[-1] and run["comparable"] == alone["plain"]["run"]["comparable"]


def test_each_step_is_one_of_its_whole_batch(alone: dict[str, Any]) -> None:
    """Losses and gradients are means over the samples, and the rate is that of the samples read."""
    steps = [[r["train/loss"], r["train/grad_norm"], r["train/lr"]] for r in trained(alone["growing"])]
    assert steps[1:] == [pytest.approx(step, rel=1e-5) for step in alone["steps"]]
    read = [0, *accumulate(RUN_BATCHES)]
    rates = [expected_rate(OptimConfig(lr=2e-3, min_lr=2e-4), samples, 0, read[-1]) for samples in read[:-1]]
    assert [step[2] for step in steps] == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_resume_is_bitwise_in_each_phase_and_at_its_end(alone: dict[str, Any], step: int) -> None:
    whole, again = alone["growing"], alone[f"after {step}"]
    assert again["losses"] == whole["losses"][step:] and again["norms"] == whole["norms"][step:]
    assert again["state"] == whole["state"] and len(whole["losses"]) == 5
    for key in ("val/loss", "tokens", "flops/model", "flops/dense", "flops/paper", "train/lr", "train/global_batch"):
        ours, theirs = ([r.get(key) for r in run["records"] if r["step"] > step] for run in (again, whole))
        assert ours == theirs and any(ours)


def test_a_schedule_of_the_whole_batch_is_none(alone: dict[str, Any]) -> None:
    plain, whole = alone["plain"], alone["whole"]
    assert (whole["losses"], whole["norms"], whole["state"]) == (plain["losses"], plain["norms"], plain["state"])
    assert len(plain["losses"]) == 3
    clock = re.compile("second|straggler|memory|checkpoint/")
    ours, theirs = (
        [{key: value for key, value in record.items() if not clock.search(key)} for record in run["records"]]
        for run in (whole, plain)
    )
    assert ours == theirs
    assert {**whole["run"], "name": "plain"} == plain["run"] and "batch_schedule" not in plain["run"]
    assert "training.batch_schedule" not in plain["run"]["identity"]


def test_each_phase_is_timed_with_its_batch(alone: dict[str, Any]) -> None:
    timing = alone["timing"]
    assert timing["steps"] == 2 * 3
    assert [phase["last"] for phase in timing["phases"]] == [2, 3, 5]
    seconds = [phase["step_seconds"] for phase in timing["phases"]]
    mean = (2 * seconds[0] + seconds[1] + 2 * seconds[2]) / 5
    assert timing["step_seconds"] == pytest.approx(mean)
    assert timing["tokens_per_second"] == pytest.approx(sum(RUN_BATCHES) * LENGTH / 5 / mean)


LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 2, "sequence": True},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"context": 2},
    {},
    {"sharded_optimizer": True, "overlap": True},
]


@pytest.mark.distributed
@pytest.mark.slow
def test_layouts_agree_with_one_process(alone: dict[str, Any], check_layouts: Callable[..., None]) -> None:
    check_layouts(alone["growing"], SETTINGS, LAYOUTS)


@pytest.mark.slow
def test_with_a_curriculum_a_step_has_the_batch_of_one_and_the_length_of_the_other(
    sample_cache: Path, tmp_path: Path
) -> None:
    runs = [{"name": "both", **WITH_CURRICULUM}]
    for step in (1, 2, 3):
        checkpoint = str(tmp_path / "both" / "checkpoints" / f"step_{step:08d}")
        runs.append({"name": f"after {step}", "resume": checkpoint, **WITH_CURRICULUM})
    lengths = [16, 16, 16, 64, 64]
    found = train_and_count(str(tmp_path), str(sample_cache), runs, RUN_BATCHES, lengths)
    steps = trained(found["both"])
    assert [record["train/sequence_length"] for record in steps] == lengths
    assert [record["train/global_batch"] for record in steps] == RUN_BATCHES
    measured = [[r["train/loss"], r["train/grad_norm"], r["train/lr"]] for r in steps]
    assert measured[1:] == [pytest.approx(step, rel=1e-5) for step in found["steps"]]
    triangles = [
        LAYERS * LENGTH * batch * (length + 1) // 2 for batch, length in zip(RUN_BATCHES, lengths, strict=True)
    ]
    for record, pairs, triangle in zip(steps, found["pairs"], triangles, strict=True):
        assert record["train/attended_share"] == pairs / triangle
    weights = LAYERS * (4 * HIDDEN**2 + 2 * HIDDEN * FFN) + HIDDEN * TABLE
    tokens = LENGTH * sum(RUN_BATCHES)
    assert steps[-1]["flops/model"] == 3 * (2 * weights * tokens + 4 * HIDDEN * sum(found["pairs"]))
    assert steps[-1]["flops/dense"] == 3 * (2 * weights * tokens + 4 * HIDDEN * sum(triangles))
    for step in (1, 2, 3):
        assert found[f"after {step}"]["losses"] == found["both"]["losses"][step:]
        assert found[f"after {step}"]["state"] == found["both"]["state"]


def test_the_schedule_is_part_of_what_a_run_is() -> None:
    def recorded(schedule: list[Any]) -> dict[str, Any]:
        return json.loads(json.dumps(identity(config_with(schedule), 1, {}, "")))

    plain, growing = recorded([]), recorded(GROWING)
    assert recorded([{"batch": 4, "tokens": 9 * 2048}, {"batch": 8, "samples": 10}]) == growing
    assert recorded([{"batch": 16, "samples": 9}]) == plain and "training.batch_schedule" not in plain
    steps = re.escape("[{'batch': 4, 'steps': 3}, {'batch': 8, 'steps': 2}]")
    check_identity(growing, growing, "here", "no")
    with pytest.raises(UserError, match=rf"training.batch_schedule=\[\], this run has {steps}"):
        check_identity(plain, growing, "here", "no")
    with pytest.raises(UserError, match=rf"training.batch_schedule={steps}, this run has \[\]"):
        check_identity(growing, plain, "here", "no")
    with pytest.raises(UserError, match="training.batch_schedule="):
        check_identity(growing, recorded(GROWING[:1]), "here", "no")


GROWING_RUN = (
    "training.steps=6",
    "training.global_batch=8",
    "training.micro_batch=2",
    "training.batch_schedule=[{batch: 2, samples: 4}, {batch: 4, samples: 8}]",
    "training.checkpoint_interval=1",
    "training.keep_checkpoints=9",
    "logging.interval=100",
)


def test_the_start_gives_sequences_and_tokens_of_the_run(trainer: Any, finished: Callable) -> None:
    outcome = trainer.here("name=dry", *GROWING_RUN, "dry_run=true")
    assert outcome.code == 0, outcome.errors
    text = outcome.unfolded
    assert (
        "batch: 2 to 8 sequences x 128 = 256 to 1,024 tokens a step | 1 to 4 micro-batches of 2 on each replica | "
        "6 steps = 28 sequences = 3.58k tokens = "
    ) in text
    assert "passes over the training data | the learning rate follows the sequences read" in text
    phases = re.findall(
        r"phase: (steps \d to \d \| \d sequences x 128 a step, as \d micro-batches of 2) .* in all", text
    )
    assert phases == [
        "steps 1 to 2 | 2 sequences x 128 a step, as 1 micro-batches of 2",
        "steps 3 to 4 | 4 sequences x 128 a step, as 2 micro-batches of 2",
        "steps 5 to 6 | 8 sequences x 128 a step, as 4 micro-batches of 2",
    ]
    each, whole = (
        float(re.search(rf"{words} ([\d.]+) ?[A-Z]", text).group(1))  # type: ignore[union-attr]
        for words in (r"FLOPs per token:", r"whole run")
    )
    # MFLOP a token, GFLOP in all.
    assert whole == pytest.approx(each * 28 * 128 / 1e3, rel=0.01)


def test_the_time_left_goes_with_samples(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is at 100 s whenever it is read after the start, with 4 and 12 samples of 28 done."""
    reads = chain([0.0], repeat(100.0))
    monkeypatch.setattr(step_logger, "time", SimpleNamespace(perf_counter=lambda: next(reads)))
    outcome = trainer.here(
        "name=clock", *GROWING_RUN, "training.validation_interval=0", "training.checkpoint_interval=0"
    )
    assert outcome.code == 0, outcome.errors
    shown = re.findall(r"step (\d)/6 .* batch (\d) .* ETA (\S+)", outcome.unfolded)
    left = [duration(seconds) for seconds in (100 / 4 * 24, 100 / 12 * 16, 0)]
    assert shown == [("2", "2", left[0]), ("4", "4", left[1]), ("6", "8", left[2])]


def test_a_killed_run_goes_on_in_place(trainer: Any, finished: Callable) -> None:
    """From what it left when it was killed after each step: in the phases, and where one ends."""
    finished("growing", *GROWING_RUN)
    folder = trainer.root / "growing"
    records = trainer.records("growing")
    assert [r["step"] for r in records if "train/loss" in r] == [1, 2, 3, 4, 5, 6]
    last = digest(folder / "checkpoints" / "step_00000006")
    for step in (1, 2, 3):
        killed = trainer.root / f"killed_{step}"
        shutil.copytree(folder, killed)
        for later in range(step + 1, 7):
            shutil.rmtree(killed / "checkpoints" / f"step_{later:08d}")
        run = json.loads((killed / "run.json").read_text())
        (killed / "run.json").write_text(json.dumps({**run, "name": killed.name, "status": "running"}))
        outcome = trainer.here(f"name={killed.name}", *GROWING_RUN)
        assert outcome.code == 0, outcome.errors
        assert digest(killed / "checkpoints" / "step_00000006") == last
        for key in ("train/loss", "train/lr", "tokens", "flops/model", "val/loss"):
            assert trainer.values(killed.name, key) == trainer.values("growing", key)
    other = trainer.here(
        "name=other", f"resume={folder / 'checkpoints' / 'step_00000001'}", *GROWING_RUN[:3], *GROWING_RUN[4:]
    )
    assert other.code == 2 and "training.batch_schedule=[{'batch': 2, 'steps': 2}, {'batch': 4, 'steps': 2}]" in (
        other.errors.replace("\n", " ")
    )
    assert not (trainer.root / "other").exists()


def test_the_documents_of_a_bad_step_are_those_of_its_batch(
    trainer: Any, finished: Callable, sample_dataset: Any
) -> None:
    spoiling = ("optim.lr=1e30", "optim.min_lr=0", "optim.warmup_steps=0", "training.max_bad_steps=0")
    trainer.here("name=spoilt", *GROWING_RUN, *spoiling, "training.validation_interval=0")
    lines = (trainer.root / "spoilt" / "bad_steps.jsonl").read_text().splitlines()
    bad = {record["step"]: record for record in map(json.loads, lines)}
    batches = [2, 2, 4, 4, 8, 8]
    assert set(bad) >= {4, 5, 6}
    for step, record in bad.items():
        begin = sum(batches[: step - 1])
        read = [sample_dataset.documents(number)[1] for number in range(begin, begin + batches[step - 1])]
        assert list(record["documents"].values()) == [sorted({number for each in read for number in each})]

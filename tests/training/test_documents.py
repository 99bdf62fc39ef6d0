"""Runs whose positions restart at documents and whose boundary labels are masked: figures, resume, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sepllm_train.analysis.losses import LossAnalysis, LossOptions
from sepllm_train.analysis.mass import attention_mass
from sepllm_train.analysis.probe.interventions import Text
from sepllm_train.base.errors import UserError
from sepllm_train.compare.variants import check_comparable
from sepllm_train.config.schema import AttentionConfig, Config, DataConfig
from sepllm_train.data.splits import build_datasets
from sepllm_train.distributed.launch import alone
from sepllm_train.runs.evaluate import evaluate, evaluate_run
from sepllm_train.runs.held_out import text_of
from sepllm_train.runs.open import open_run
from sepllm_train.runs.records import read_run
from sepllm_train.training.checkpoint.identity import check_identity, identity
from tests.training.conftest import Trainer
from tests.training.resume_worker import described

KEYS = ("attention.separate_documents=true", "attention.restart_positions=true", "data.mask_boundary_loss=true")
SHORT = ("data.sequence_length=64", "training.global_batch=4", "training.micro_batch=1", "logging.interval=1")
Finished = Callable[..., str]


@pytest.fixture
def folder(trainer: Trainer, finished: Finished) -> Path:
    """A finished run of 4 steps with a checkpoint after 2. It attends across documents, where positions that restart
    are not as good as those of the sequence."""
    return trainer.root / finished("documents", *SHORT, *KEYS[1:])


def test_the_start_names_what_ends_with_a_document(trainer: Trainer) -> None:
    outcome = trainer.here("name=documents_dry", "dry_run=true", *SHORT, *KEYS)
    line = "attention within a document | positions restart at each | the first token of the next document does not"
    assert f"documents: {line} count as a label" in outcome.unfolded
    outcome = trainer.here("name=documents_dry", "dry_run=true", *SHORT, KEYS[2])
    assert "documents: attention across documents | positions of the sequence | the first" in outcome.unfolded
    assert "documents: a" not in trainer.here("name=documents_dry", "dry_run=true", *SHORT, KEYS[0]).unfolded


def test_figures_are_of_the_labels_that_count(trainer: Trainer, folder: Path) -> None:
    run = open_run(folder)
    with alone():
        dataset, _ = build_datasets(run.config, run.corpus)
        masks = torch.stack([dataset[number]["loss_mask"] for number in range(16)]).double()
        samples = run.config.training.validation_samples
        text = text_of(run.validation, samples)
        losses = evaluate(run.model, run.pattern, run.validation, samples)
    assert trainer.values("documents", "train/counted_share") == pytest.approx(masks.view(4, -1).mean(1).tolist())
    assert 0 < masks.mean() < 1
    counted = text["loss_mask"]
    assert losses.counted is not None and torch.equal(losses.counted, counted) and not counted.all()
    nats = losses.nats.double()[counted]
    loss, bits = (trainer.values("documents", f"val/{key}")[-1] for key in ("loss", "bits_per_byte"))
    assert loss == pytest.approx(float(nats.mean()), rel=1e-6)
    assert loss != pytest.approx(float(losses.nats.double().mean()), rel=1e-6)
    size = int(torch.tensor(run.corpus.token_bytes)[text["labels"]][counted].sum())
    assert bits == pytest.approx(float(nats.sum()) / size / math.log(2), rel=1e-6)
    found = evaluate_run(run, samples)
    assert found["loss"] == pytest.approx(loss, rel=1e-6) and found["tokens"] == int(counted.sum())


def test_analyses_have_the_positions_and_labels_of_training(trainer: Trainer, folder: Path) -> None:
    run = open_run(folder)
    loss = trainer.values("documents", "val/loss")[-1]
    with alone():
        samples = run.config.training.validation_samples
        analysis = LossAnalysis(run, LossOptions(lengths=[32, 64]), samples)
        result = analysis.answer(lambda: None)
        ours = evaluate(run.model, run.pattern, run.validation, samples).nats
        device = next(run.model.parameters()).device
        with torch.no_grad():
            probed = [Text.of(run.validation[n], device).forward(run.model, run.pattern) for n in range(samples)]
        settings = {"window": 16, "initial": 3, "layers": [1], "heads": [0]}
        masses = [
            attention_mass(run.model, pattern, run.validation, samples, **settings).mass
            for pattern in (run.pattern, replace(run.pattern, restart_positions=False))
        ]
    assert result["patterns"][0]["loss"].mean == result["sweep"][1]["trained_loss"].mean
    assert result["patterns"][0]["loss"].mean == pytest.approx(loss, rel=1e-6)
    assert torch.equal(torch.stack(probed).cpu(), ours)
    assert (masses[0] - masses[1]).abs().max() > 1e-6


def test_resume_is_bitwise(trainer: Trainer, folder: Path) -> None:
    checkpoint = folder / "checkpoints" / "step_00000002"
    outcome = trainer.here("name=documents_again", f"resume={checkpoint}", *SHORT, *KEYS[1:])
    assert outcome.code == 0, outcome.errors
    again, whole = (described(trainer.root / name) for name in ("documents_again", "documents"))
    assert len(again["losses"]) == 2 and again["losses"] == whole["losses"][2:]
    assert again["norms"] == whole["norms"][2:] and again["state"] == whole["state"]
    for key, value in zip(KEYS[1:], ("attention.restart_positions", "data.mask_boundary_loss"), strict=True):
        others = [other for other in KEYS[1:] if other != key]
        outcome = trainer.here("name=documents_other", f"resume={checkpoint}", *SHORT, *others)
        assert outcome.code == 2 and f"was written with {value}=True, this run has False" in outcome.sentence


def test_runs_of_other_labels_do_not_compare(trainer: Trainer, folder: Path, finished: Finished) -> None:
    """Their losses are of other tokens; runs of other positions compare, and differ in that."""
    plain = trainer.root / finished("documents_plain", *SHORT)
    placed = trainer.root / finished("documents_placed", *SHORT, KEYS[1])
    runs = [read_run(path) for path in (plain, placed, folder)]
    check_comparable(runs[:2])
    with pytest.raises(UserError, match="mask_boundary_loss"):
        check_comparable(runs[1:])
    infos = [json.loads((path / "run.json").read_text()) for path in (plain, placed)]
    assert [info["attention"].get("restart_positions") for info in infos] == [None, True]
    flops = [trainer.values(name, "flops/model") for name in ("documents_plain", "documents_placed", "documents")]
    assert flops[0] == flops[1] == flops[2]


def test_checkpoints_of_before_have_neither() -> None:
    plain = json.loads(json.dumps(identity(Config(), 1, {}, "")))
    before = {k: v for k, v in plain.items() if not k.endswith(("restart_positions", "mask_boundary_loss"))}
    assert len(before) == len(plain) - 2
    check_identity(before, plain, "here", "no")
    for config in (
        Config(attention=AttentionConfig(restart_positions=True)),
        Config(data=DataConfig(mask_boundary_loss=True)),
    ):
        with pytest.raises(UserError, match=r"=False, this run has True"):
            check_identity(before, json.loads(json.dumps(identity(config, 1, {}, ""))), "here", "no")

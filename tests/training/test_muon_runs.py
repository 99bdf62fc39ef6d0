"""Runs with Muon and parameter groups: resume, records and start lines."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sepllm_train.config.compatibility import MUON
from sepllm_train.training.checkpoint import digest, read_state


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_is_bitwise_the_same(trainer: Any, finished: Any, precision: str) -> None:
    settings = ("optim.optimizer=muon", "optim.groups=[{match: '*.bias', lr_factor: 2}]", "optim.lr=5e-3")
    settings += (f"training.precision={precision}", "training.validation_interval=0")
    whole = finished(f"muon_{precision}", *settings)
    half = trainer.root / whole / "checkpoints" / "step_00000002"
    again = finished(f"muon_{precision}_again", *settings, f"resume={half}")
    assert trainer.values(again, "train/loss")[-1] == trainer.values(whole, "train/loss")[-1]
    assert digest(trainer.root / again) == digest(trainer.root / whole)
    state = read_state(trainer.root / whole / "checkpoints" / "step_00000004")
    assert state["identity"][MUON] == [
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    ]
    assert state["schedule"]["optim.optimizer"] == "muon"


def test_the_start_says_what_muon_updates(trainer: Any) -> None:
    settings = ("optim.optimizer=muon", "optim.groups=[{match: '*.mlp.*', optimizer: adam, lr_factor: 0.5}]")
    outcome = trainer.here("name=lines", "dry_run=true", "optim.lr=2e-3", *settings)
    assert outcome.code == 0, outcome.errors
    assert (
        "muon: 32,768 parameters, the layers' self_attention.linear_qkv.weight, self_attention.linear_proj.weight; "
        "Adam the rest | update scaled by 0.2 sqrt(max(rows, columns)) to the size of Adam's | "
    ) in outcome.unfolded
    assert "group *.mlp.*: 8 parameter tensors | lr x 0.5 = 0.001 | optimizer adam" in outcome.unfolded


def test_a_run_keeps_its_optimizer(trainer: Any, finished: Any) -> None:
    muon = finished("muon_fp32", "optim.optimizer=muon")
    in_place = trainer.here(f"name={muon}", "training.steps=6")
    assert in_place.code == 2 and "optim.muon" not in in_place.sentence
    half = trainer.root / muon / "checkpoints" / "step_00000002"
    elsewhere = trainer.here("name=other", f"resume={half}")
    assert elsewhere.code == 2
    assert "was written with Muon for self_attention.linear_qkv.weight" in elsewhere.sentence
    assert "this run has it for no matrices" in elsewhere.sentence
    assert not (trainer.root / "other").exists()


def test_a_run_with_adam_has_the_records_of_before(trainer: Any, finished: Any) -> None:
    name = finished("plain")
    record = json.loads((trainer.root / name / "run.json").read_text())
    assert MUON not in record["identity"]
    assert record["schedule"]["optim.optimizer"] == "adam" and record["schedule"]["optim.groups"] == []

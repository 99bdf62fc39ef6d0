"""Placement and chosen separators are part of what a run is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from data_prep.separators import CLASSES, PAPER
from data_prep.sidecar import read_header
from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import AttentionConfig, Config
from sepllm_train.training.checkpoint import check_identity, identity


def identity_with(**attention: Any) -> dict[str, Any]:
    """Identity of a run, as a checkpoint gives it back."""
    return json.loads(json.dumps(identity(Config(attention=AttentionConfig(**attention)), 4096, {}, "hash")))


@pytest.mark.parametrize(
    ("written", "wanted", "words"),
    [
        ({}, {"placement": "shuffled"}, "attention.placement=natural, this run has shuffled"),
        ({"placement": "preceding"}, {}, "attention.placement=preceding, this run has natural"),
        (
            {"placement": "thinned", "keep_share": 0.5},
            {"placement": "thinned", "keep_share": 0.25},
            "attention.keep_share=0.5, this run has 0.25",
        ),
        ({"separators": ["period"]}, {"separators": ["comma"]}, "attention.separators="),
    ],
)
def test_another_placement_is_another_run(written: Any, wanted: Any, words: str) -> None:
    check_identity(identity_with(**written), identity_with(**written), "here", "no")
    with pytest.raises(UserError, match=words):
        check_identity(identity_with(**written), identity_with(**wanted), "here", "no")


def test_names_of_a_set_are_the_set() -> None:
    names = [entry.name for entry in CLASSES if entry.number in PAPER]
    tiers = [{"classes": names, "horizon": "forever"}]
    for written, wanted in (("paper", names), (names[::-1], "paper"), (tiers, names)):
        check_identity(identity_with(separators=written), identity_with(separators=wanted), "here", "no")
    unknown = {**identity_with(), "attention.separators": ["dot"]}
    for other in (unknown, identity_with(separators=names[1:])):
        with pytest.raises(UserError, match="attention.separators="):
            check_identity(other, identity_with(), "here", "no")


DATA = {"docs": {"sha256": "a" * 64, "weight": 0.25}, "notes": {"sha256": "b" * 64, "weight": 0.75}}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"docs": DATA["docs"]}, "the data sources docs, this run has docs, notes"),
        (
            {**DATA, "notes": {"sha256": "c" * 64, "weight": 0.5}},
            "other tokens in the data source notes: their SHA-256 is cccccccccccc..., this run has bbbbbbbbbbbb...",
        ),
        ({**DATA, "docs": {**DATA["docs"], "weight": 0.5}}, "weight 0.5 of the data source docs, this run has 0.25"),
    ],
)
def test_what_of_the_data_differs_is_told(found: dict[str, Any], words: str) -> None:
    written, wanted = (identity(Config(), 4096, data, "hash") for data in (found, DATA))
    with pytest.raises(UserError) as refused:
        check_identity(written, wanted, "here", "no")
    assert str(refused.value) == f"here was written with {words}: no."


def test_checkpoints_of_before_are_natural() -> None:
    before = {
        key: value for key, value in identity_with().items() if key.split(".")[-1] not in ("placement", "keep_share")
    }
    check_identity(before, identity_with(), "here", "no")
    check_identity(before, identity_with(density_budget=[0.1, 0.2]), "here", "no")
    with pytest.raises(UserError, match="attention.placement=natural, this run has shuffled"):
        check_identity(before, identity_with(placement="shuffled"), "here", "no")


def test_a_placed_run_with_chosen_classes(trainer: Any, sample_prefix: Path) -> None:
    chosen = ("attention=sep_auto", "attention.placement=shuffled", "training.validation_samples=8")
    trained = trainer.here("name=auto", *chosen)
    assert trained.code == 0, trained.errors
    told = json.loads((trainer.root / "auto" / "run.json").read_text())
    names = told["attention"]["separators"]
    shares = {entry.name: entry.density for entry in read_header(sample_prefix).classes}
    density = sum(shares[name] for name in names)
    assert told["attention"]["placement"] == "shuffled"
    assert told["attention"]["auto"]["density"] == pytest.approx(density) and 0.08 <= density <= 0.16
    assert told["identity"]["attention.separators"] == names
    assert OmegaConf.load(trainer.root / "auto" / "config.yaml").attention.separators == names
    line = f"separators: auto took {', '.join(names)} | {density:.1%} of the tokens, budget 8.0% to 16.0%"
    assert line in trained.unfolded and "| separators shuffled |" in trained.unfolded
    other = trainer.here(
        "name=later", f"resume={trainer.root / 'auto'}", *chosen, "attention.density_budget=[0.04,0.08]", "dry_run=true"
    )
    assert other.code == 2 and "was written with attention.separators=" in other.sentence

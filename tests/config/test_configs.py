"""Every shipped YAML composes into a configuration that passes the checks of a real run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from sepllm_train.cli.pretrain import parser
from sepllm_train.config.load import config_folder, register_schema, to_config
from sepllm_train.config.schema import Config
from sepllm_train.config.validate import validate
from sepllm_train.model.pattern import AUTO, resolve_pattern

FOLDER = config_folder()
GROUPS = ("model", "attention", "parallel", "optim", "logging")


def load(*overrides: str) -> Config:
    """The configuration that a command line with `overrides` gives."""
    register_schema()
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        return to_config(compose("pretrain", overrides=list(overrides)))


def names(group: str) -> list[str]:
    """The files of a group."""
    return sorted(path.stem for path in (FOLDER / group).glob("*.yaml"))


@pytest.mark.parametrize("name", names("experiment"))
def test_experiment(name: str) -> None:
    config = load(f"+experiment={name}")
    validate(config, world_size=1)
    assert config.name == name
    # Without the run it begins with, post-training would train from scratch unnoticed.
    assert (config.init_from == "RUN") == name.startswith("posttrain")
    assert len(resolve_pattern(config.attention, config.model.layers).layers) == config.model.layers
    head = (FOLDER / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert head[1].startswith("# sepllm pretrain ") and head[1].endswith(f" +experiment={name}")
    arguments, overrides = parser().parse_known_args(head[1].removeprefix("# sepllm pretrain ").split())
    assert overrides == [f"+experiment={name}"] and arguments.nproc >= 1


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in names(group)])
def test_group_file(group: str, name: str) -> None:
    config = load("+experiment=demo_sep", f"{group}={name}")
    validate(config, world_size=config.parallel.processes)
    if config.attention.separators != AUTO:  # that one is resolved from data
        resolve_pattern(config.attention, config.model.layers)


def test_every_file_belongs_to_a_tested_group() -> None:
    folders = {path.name for path in Path(FOLDER).iterdir() if path.is_dir() and any(path.glob("*.yaml"))}
    assert folders == {*GROUPS, "experiment", "data", "suite"}


def test_paper_recipe() -> None:
    """REFERENCE: Pythia-160m-deduped's schedule and the paper's a = 3, n = 64."""
    config = load("+experiment=pythia160m_sep")
    training, optim, attention = config.training, config.optim, config.attention
    assert (training.steps, training.global_batch, config.data.sequence_length) == (143000, 1024, 2048)
    assert (optim.lr, optim.min_lr, optim.schedule, optim.warmup_fraction) == (6e-4, 6e-5, "cosine", 0.01)
    assert (optim.beta1, optim.beta2, optim.epsilon, optim.weight_decay, optim.clip_grad) == (0.9, 0.95, 1e-8, 0.1, 1)
    assert (attention.pattern, attention.initial_tokens, attention.window) == ("sep", 3, 64)
    assert attention.separators == "paper" and not attention.separate_documents


def test_pairs_differ_in_attention_only() -> None:
    for dense, sep in (("pythia160m_dense", "pythia160m_sep"), ("demo_dense", "demo_sep")):
        one, other = load(f"+experiment={dense}"), load(f"+experiment={sep}")
        assert (one.model, one.optim, one.training, one.data) == (other.model, other.optim, other.training, other.data)
        assert one.attention.pattern == "dense" and other.attention.pattern == "sep"


def test_controls_differ_from_sep_in_placement_alone() -> None:
    sep = load("+experiment=demo_sep").attention
    for kind, share in (("shuffled", None), ("preceding", None), ("thinned", 0.5)):
        control = load("+experiment=demo_sep", f"attention=sep_{kind}").attention
        assert control == replace(sep, placement=kind, keep_share=share)
    auto = load("+experiment=demo_sep", "attention=sep_auto").attention
    assert auto == replace(sep, separators="auto") and auto.density_budget == [0.08, 0.16]


def test_bounded_tiers_have_the_classes_of_tiers_and_an_end() -> None:
    tiers, bounded = (
        load("+experiment=demo_sep", f"attention={name}").attention for name in ("tiers", "tiers_bounded")
    )
    assert [t["classes"] for t in tiers.separators] == [t["classes"] for t in bounded.separators]
    assert [t["horizon"] for t in bounded.separators] == [512, 4096, 16384]
    assert (resolve_pattern(bounded, 1).tier_of_class != 1).all()

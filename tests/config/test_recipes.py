"""Model sizes and experiments against the published settings, key by key; differences are listed in docs/pythia.md."""

from __future__ import annotations

import math
import re
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sepllm_train.base.errors import UserError
from sepllm_train.config.load import config_folder, configuration_of
from sepllm_train.config.schema import Config, ModelConfig, OptimConfig
from sepllm_train.training.console_lines import recipe_line
from sepllm_train.training.setup import build_scheduler, learning_rate
from tests.config.published import COMMON, EXPERIMENTS, OURS, SIZES, facts_of_experiment, facts_of_size

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pythia.md"


def value(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, key.split("."), config)


def table(heading: str) -> list[list[str]]:
    """Rows of the table below a heading of the page, without its head; marks of code are taken off."""
    section = PAGE.read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().replace("`", "") for cell in row.strip("|").split("|")] for row in rows]


def differences(config: Config, facts: dict[str, Any]) -> set[tuple[str, str, str]]:
    """Keys in which a configuration is not as published: key, published value, value."""
    return {
        (key, str(published), str(value(config, key)))
        for key, published in facts.items()
        if value(config, key) != published
    }


@pytest.fixture(scope="module")
def listed() -> set[tuple[str, str, str]]:
    """Differences that the page lists; each has a reason."""
    rows = table("Where we differ")
    assert all(len(row) == 4 and row[3] for row in rows)
    return {(key, published, here) for key, published, here, _ in rows}


def test_every_size_and_experiment_is_known() -> None:
    files = {path.stem for path in (config_folder() / "model").glob("pythia*.yaml")} - {"pythia"}
    assert files == set(SIZES)
    experiments = {path.stem for path in (config_folder() / "experiment").glob("*.yaml")}
    assert experiments == {*EXPERIMENTS, *OURS}


def test_differences_from_what_was_published_are_listed(listed: set[tuple[str, str, str]]) -> None:
    found = {}
    for size in SIZES:
        found[size] = differences(configuration_of([f"model={size}", "attention=dense"]), facts_of_size(size))
    for name in EXPERIMENTS:
        found[name] = differences(configuration_of([f"+experiment={name}"]), facts_of_experiment(name))
    unlisted = {name: own - listed for name, own in found.items() if own - listed}
    assert not unlisted
    assert not listed - set().union(*found.values()), "listed, but no longer so"


def test_the_page_prints_the_facts() -> None:
    common = {key: shown for key, shown, *_ in table("All sizes")}
    assert common == {key: str(fact) for key, fact in COMMON.items()}
    rows = {row[0]: row[1:] for row in table("Sizes")}
    for size, facts in SIZES.items():
        shape = "/".join(str(facts[f"model.{key}"]) for key in ("layers", "hidden", "heads"))
        recipe = {key: facts[f"model.recipe.{key}"] for key in ("micro_batch", "gpus", "tensor", "vocabulary")}
        batch = f"{recipe['micro_batch']} x {recipe['gpus']}"
        init = "small" if facts["model.init"] == "pythia" else "0.02, 0.0025"
        expected = [shape, f"{facts['optim.lr']:g}", batch, str(recipe["tensor"]), f"{recipe['vocabulary']:,}", init]
        assert rows[size] == expected
    assert rows.keys() == SIZES.keys()
    assert {row[0] for row in table("SepLLM's experiments")} == EXPERIMENTS.keys()


def test_what_the_user_sets_wins() -> None:
    for overrides, rates in {
        (): (3e-4, 3e-5),
        ("optim.lr=1e-3",): (1e-3, 1e-4),
        ("optim.min_lr=1e-6",): (3e-4, 1e-6),
        ("optim.lr=1e-3", "optim.min_lr=0"): (1e-3, 0.0),
        ("model.recipe.rate=1e-2",): (1e-2, 1e-3),
    }.items():
        assert configuration_of(["model=pythia410m", *overrides]).optim.rates == rates
    for size in SIZES:
        lr, min_lr = configuration_of([f"model={size}"]).optim.rates
        assert min_lr == SIZES[size]["optim.min_lr"] and math.isclose(min_lr, lr / 10)
    with pytest.raises(UserError, match=r"optim\.lr=0\.0003 must be above 0 and at least optim\.min_lr=0\.001"):
        configuration_of(["model=pythia410m", "optim.min_lr=1e-3"])


def test_the_start_says_what_came_from_the_recipe() -> None:
    lines = {
        ("model=pythia410m",): "recipe: pythia410m | lr 0.0003 falling to 3e-05 | schedule cosine | gelu_tanh | "
        "published run: micro-batches of 32 on 32 GPUs",
        ("model=pythia12b", "optim.lr=1e-3", "optim=pythia"): "recipe: pythia12b | lr 0.001 falling to 0.0001 (yours; "
        "published 0.00012) | schedule pythia | gelu_tanh | published run: micro-batches of 8 on 256 GPUs, tensor 4",
        ("model=llama160m",): "optimizer: lr 0.0006 falling to 6e-05, assumed: no recipe is published for llama160m | "
        "schedule cosine",
        ("model=demo", "optim.lr=2e-3", "optim.schedule=constant"): "optimizer: lr 0.002 | schedule constant",
    }
    for overrides, line in lines.items():
        assert recipe_line(configuration_of(list(overrides))) == line


def test_rates_without_a_model() -> None:
    assert Config().optim.rates == (6e-4, 6e-5)
    assert Config(optim=OptimConfig(lr=1e-3)).optim.rates == (1e-3, 1e-4)
    assert OptimConfig(lr=2e-3, min_lr=0.0).rates == (2e-3, 0.0)
    assert ModelConfig().recipe.rate is None


def pythia_v1(step: int, *, lr: float, steps: int, warmup: int) -> float:
    """GPT-NeoX v1.0's AnnealingLR, as Pythia used it."""
    least = lr / 10
    if step <= warmup:
        return lr * step / warmup
    passed = min(step, steps - warmup) - warmup
    return max(lr / 2 * (math.cos(math.pi * passed / steps) + 1), least)


def rates(*overrides: str) -> np.ndarray:
    """f64 [steps + 1], learning rate after k steps."""
    config = configuration_of(list(overrides))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(config, optimizer)  # type: ignore[arg-type]
    found = []
    for _ in range(config.training.steps + 1):
        found.append(learning_rate(scheduler))
        scheduler.step(increment=1)
    return np.array(found)


def test_pythias_schedule() -> None:
    pythia = rates("model=pythia1.4b", "optim=pythia")
    expected = [pythia_v1(step, lr=2e-4, steps=143_000, warmup=1430) for step in range(143_001)]
    np.testing.assert_allclose(pythia, expected, rtol=1e-12, atol=0)
    assert pythia[0] == 0
    # docs/pythia.md names these.
    ratios = rates("model=pythia1.4b")[1:] / pythia[1:]
    told = re.search(r"([\d.]+)x at step 71,500, ([\d.]+)x at 93,000 and ([\d.]+)x at\s+115,139", PAGE.read_text())
    assert told is not None
    for step, figure in zip((71_500, 93_000, 115_139), told.groups(), strict=True):
        assert f"{ratios[step - 1]:.2f}" == figure


def test_pythias_checkpoints() -> None:
    training = configuration_of(["model=pythia160m", "training.checkpoint_steps=pythia"]).training
    steps = [step for step in range(143_001) if training.keeps(step)]
    assert steps == [0, *(2**power for power in range(10)), *range(1000, 143_001, 1000)]
    assert len(steps) == training.kept() == 154


def test_kept_checkpoints_are_counted_for_runs_of_any_length() -> None:
    """Of every N-th step those that are written: its multiples that are also the interval's."""
    for settings, count in {
        ("training.steps=100", "training.checkpoint_interval=10", "training.keep_every=25"): 2,
        ("training.steps=100", "training.checkpoint_interval=0", "training.keep_every=25"): 0,
        ("training.steps=100", "training.checkpoint_steps=[0,7]"): 2,
        ("training.steps=1000000000000", "training.checkpoint_interval=1000", "training.keep_every=1000"): 10**9,
    }.items():
        assert configuration_of(list(settings)).training.kept() == count


def test_published_rows_are_taken_with_a_tokenizer_that_they_fit() -> None:
    """Pythia's tokenizer has 50,254 entries, 50,277 with those that were added."""
    for size, rows in (("pythia160m", 50_304), ("pythia6.9b", 50_432), ("pythia12b", 50_688)):
        model = configuration_of([f"model={size}"]).model
        assert [model.entries(count) for count in (50_254, 50_277, 4096, 65_536)] == [rows, rows, 4096, 65_536]
    assert configuration_of(["model=pythia160m", "model.vocabulary=50277"]).model.entries(50_277) == 50_277
    assert configuration_of(["model=llama8b"]).model.entries(50_277) == 50_277

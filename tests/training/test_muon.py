"""Muon: its steps beside torch's, fused matrices, parameter groups and state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sepllm_train.config.param_groups import muon_matrices, parameter_names
from sepllm_train.config.schema import AttentionConfig, Config, ModelConfig, OptimConfig, TrainingConfig
from sepllm_train.metrics.memory import memory_estimate
from sepllm_train.model.build import padded_vocabulary
from sepllm_train.model.initialization import global_names
from sepllm_train.training.muon import FUSED_ROWS, Muon, orthogonalize
from sepllm_train.training.setup import Training, build_training, learning_rate, set_schedule
from tests.training.checkpoints import VOCABULARY, config_of, update

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(24, 64), (64, 24), (32, 32)]


def grads_of(shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def steps_of(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], grads: list[Any]) -> None:
    for one in grads:
        for parameter, grad in zip(parameters, one, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("shape", SHAPES)
def test_in_bf16_the_steps_are_torchs(shape: tuple[int, int]) -> None:
    start, grads = torch.ones(shape), [[grad] for grad in grads_of(shape, 3)]
    ours, theirs = start.clone(), start.clone()
    settings = {"lr": 0.02, "weight_decay": 0.1}
    steps_of(Muon([{"params": [ours], FUSED_ROWS: (), **settings}], torch.bfloat16), [ours], grads)
    steps_of(torch.optim.Muon([theirs], **settings, adjust_lr_fn="match_rms_adamw"), [theirs], grads)
    assert torch.equal(ours, theirs) and not torch.equal(ours, start)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_orthogonal_matrix(shape: tuple[int, int]) -> None:
    (matrix,) = grads_of(shape, 1)
    found = orthogonalize(matrix, COEFFICIENTS, 5)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    # The iteration keeps the singular vectors, and brings every singular value that is not tiny near 1.
    values = left.T @ found @ right.T
    assert found.dtype == torch.float32
    assert values.diag().max() < 1.3 and values.diag().median() > 0.6
    assert (values - values.diag().diag()).abs().max() < 1e-4


@pytest.mark.usefixtures("grid")
def test_fused_matrices_are_updated_each_on_its_own() -> None:
    """Three groups of heads with blocks of 4 rows for queries and 2 each for keys and values."""
    rows, settings = (4, 2, 2), {"lr": 0.02, "weight_decay": 0.1}
    grads = grads_of((24, 10), 2)
    fused = torch.ones(24, 10)
    steps_of(Muon([{"params": [fused], FUSED_ROWS: rows, **settings}], torch.float32), [fused], [[g] for g in grads])
    blocks = torch.arange(24).view(3, 8)
    places = [blocks[:, :4].flatten(), blocks[:, 4:6].flatten(), blocks[:, 6:].flatten()]
    alone = [torch.ones(len(place), 10) for place in places]
    parts = [[grad[place] for place in places] for grad in grads]
    steps_of(Muon([{"params": alone, FUSED_ROWS: (), **settings}], torch.float32), alone, parts)
    for place, part in zip(places, alone, strict=True):
        torch.testing.assert_close(fused[place], part, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("model", "attention"),
    [
        ({}, {}),
        ({"bias": False, "norm": "rmsnorm", "activation": "swiglu", "kv_heads": 2}, {"qk_norm": True}),
        ({"tied_embeddings": True, "parallel_residual": False}, {"qk_norm": True, "sink": "learned"}),
    ],
)
def test_names_are_those_of_the_model(grid: torch.device, model: dict[str, Any], attention: dict[str, Any]) -> None:
    shape = {"layers": 2, "hidden": 64, "heads": 4, "ffn": 128}
    config = Config(
        model=ModelConfig(**(shape | model)),
        attention=AttentionConfig(**attention),
        optim=OptimConfig(optimizer="muon"),
        training=TrainingConfig(precision="fp32"),
    )
    training = build_training(config, VOCABULARY, grid)
    found = dict(global_names(training.modules[0]))
    assert sorted(found) == sorted(parameter_names(config))
    shapes = {name: tuple(found[f"decoder.layers.1.{name}"].shape) for name in muon_matrices(config)}
    assert len(shapes) == 4 and shapes == muon_matrices(config)
    names = {id(parameter): name.rpartition("decoder.layers.1.")[2] for name, parameter in found.items()}
    groups = [group for group in training.optimizer.param_groups if FUSED_ROWS in group]
    rows = {names[id(parameter)]: group[FUSED_ROWS] for group in groups for parameter in group["params"]}
    # Features of the queries, the key and the value of a group of heads; of gate and up projection.
    assert rows["self_attention.linear_qkv.weight"] == ((32, 16, 16) if "kv_heads" in model else (16, 16, 16))
    assert rows["mlp.linear_fc1.weight"] == ((128, 128) if "activation" in model else ())
    assert rows["self_attention.linear_proj.weight"] == rows["mlp.linear_fc2.weight"] == ()


GROUPS = [
    {"match": "*.0.*.bias", "lr_factor": 3, "weight_decay": 0.25},
    {"match": "*.mlp.*", "optimizer": "adam", "lr_factor": 0.5},
    {"match": "output_layer.weight", "weight_decay": 0},
]


@pytest.fixture
def muon(grid: torch.device, tmp_path: Path) -> tuple[Config, Training]:
    """A model with groups and Muon, after one update."""
    config = config_of(tmp_path)
    config = replace(config, optim=OptimConfig(lr=1e-2, optimizer="muon", groups=GROUPS))
    training = build_training(config, VOCABULARY, grid)
    set_schedule(training, 50)
    update(training)
    return config, training


def settings_by_name(training: Training) -> dict[str, tuple[float, float, str]]:
    """Of each parameter its learning rate over the schedule's, weight decay and optimizer."""
    names = {id(parameter): name for name, parameter in global_names(training.modules[0])}
    lr = learning_rate(training.scheduler)
    return {
        names[id(parameter)]: (
            round(group["lr"] / lr, 9),
            group["weight_decay"],
            "muon" if FUSED_ROWS in group else "adam",
        )
        for group in training.optimizer.param_groups
        for parameter in group["params"]
    }


def test_each_parameter_has_the_settings_of_its_group(muon: tuple[Config, Training]) -> None:
    config, training = muon
    found = settings_by_name(training)
    assert found.keys() == set(parameter_names(config))
    assert found["decoder.layers.0.self_attention.linear_qkv.bias"] == (3, 0.25, "adam")
    assert found["decoder.layers.1.self_attention.linear_qkv.bias"] == (1, 0, "adam")
    assert found["decoder.layers.0.mlp.linear_fc1.bias"] == (3, 0.25, "adam")
    assert found["decoder.layers.1.mlp.linear_fc1.bias"] == (0.5, 0, "adam")
    assert found["decoder.layers.1.mlp.linear_fc1.weight"] == (0.5, 0.1, "adam")
    assert found["decoder.layers.1.self_attention.linear_proj.weight"] == (1, 0.1, "muon")
    assert found["output_layer.weight"] == (1, 0, "adam")
    assert found["embedding.word_embeddings.weight"] == (1, 0.1, "adam")
    # And at another place of the schedule.
    set_schedule(training, 90)
    assert settings_by_name(training) == found


def test_the_state_takes_what_is_estimated(muon: tuple[Config, Training]) -> None:
    config, training = muon
    held = [state for part in training.optimizer.chained_optimizers for state in part.optimizer.state.values()]
    names = [set(state) - {"step"} for state in held]
    assert names.count({"momentum_buffer"}) == 4 and names.count({"exp_avg", "exp_avg_sq"}) == len(names) - 4
    found = sum(tensor.nbytes for state in held for name, tensor in state.items() if name != "step")
    padded = padded_vocabulary(VOCABULARY, 1)
    assert memory_estimate(config, padded)["optimizer"] == found
    adam = memory_estimate(replace(config, optim=OptimConfig()), padded)["optimizer"]
    # Query, key, value and output projections of two layers, one moment of four bytes less.
    assert adam - found == 2 * 4 * 64 * 64 * 4


def test_clipping_acts_on_both(grid: torch.device, tmp_path: Path) -> None:
    """The gradients that Muon takes are scaled with the others."""
    from sepllm_train.training.update import update as take_step

    config = replace(config_of(tmp_path), optim=OptimConfig(lr=1e-2, optimizer="muon", clip_grad=0.5))
    training = build_training(config, VOCABULARY, grid)
    for parameter in training.chunks[0].parameters():
        parameter.main_grad.fill_(1.0)
    one = torch.ones((), dtype=torch.float64)
    done = take_step(training.optimizer, one, one, 1, [], lambda loss, norm: None)
    elements = sum(parameter.numel() for parameter in training.chunks[0].parameters())
    assert done.grad_norm == pytest.approx(elements**0.5, rel=1e-6)
    (part,) = training.optimizer.chained_optimizers
    # The mean of gradients is 0.05 of the first one.
    for state in part.optimizer.state.values():
        if "momentum_buffer" in state:
            expected = torch.full_like(state["momentum_buffer"], 0.05 * 0.5 / elements**0.5)
            torch.testing.assert_close(state["momentum_buffer"], expected, rtol=1e-4, atol=0)

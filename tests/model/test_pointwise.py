"""Training with training.compile against training without: numbers, names of weights, number of compilations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from sepllm_train.config.schema import ModelConfig, TrainingConfig
from sepllm_train.distributed.launch import Launch
from sepllm_train.model.build import build_model
from sepllm_train.model.pointwise import Pointwise, normal
from tests.model.layout_worker import PATTERNS, train
from tests.model.tiny import VOCABULARY, tiny_config

ALONE = Launch(rank=0, world_size=1, local_rank=0, by_torchrun=False)


@pytest.fixture(autouse=True)
def nothing_compiled(compile_cache: None) -> None:
    """Begin without compiled functions."""
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.slow
# Functions that the blocks call, each compiled with and without gradients; the loss adds two without.
@pytest.mark.parametrize(
    ("pattern", "chunk", "graphs"),
    [
        ("windows, documents, sinks", 48, 2 * 4 + 2),
        ("grouped queries, query-key norm", 0, 2 * 5 + 2),
    ],
)
def test_compiled_training_equals_eager(pattern: str, chunk: int, graphs: int, device: torch.device) -> None:
    """Four layers, with a window each, of two steps of four micro-batches and of a validation share compilations."""
    runs = []
    for compiled in (False, True):
        training: dict[str, Any] = {"compile": compiled, "loss_chunk": chunk}
        runs.append(train(tiny_config(*PATTERNS[pattern], training=training), ALONE, device))
        assert counters["stats"]["unique_graphs"] == (graphs if compiled else 0)
    eager, found = runs
    assert found["losses"] == pytest.approx(eager["losses"], abs=1e-5)
    assert found["norms"] == pytest.approx(eager["norms"], rel=1e-5)
    assert found["validation"] == pytest.approx(eager["validation"], abs=1e-5)
    # Another model finds them too.
    assert train(tiny_config(*PATTERNS[pattern], training=training), ALONE, device)["losses"] == found["losses"]
    assert counters["stats"]["unique_graphs"] == graphs


def test_names_of_weights_stay(device: torch.device) -> None:
    names = [
        set(build_model(tiny_config(training={"compile": compiled}), VOCABULARY).state_dict())
        for compiled in (False, True)
    ]
    assert names[0] == names[1] and "decoder.layers.0.mlp.linear_fc1.weight" in names[0]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gelu_by_tanh(compiled: bool) -> None:
    """Pythia's, as GPT-NeoX's fused function writes it."""
    pointwise = Pointwise(ModelConfig(activation="gelu_tanh"), TrainingConfig(compile=compiled))
    x, bias = torch.linspace(-6, 6, 4096)[:, None].requires_grad_(), torch.tensor([0.25])
    wide = (x.detach().double() + 0.25).requires_grad_()
    expected = 0.5 * wide * (1 + torch.tanh(0.79788456 * wide * (1 + 0.044715 * wide * wide)))
    found = pointwise.activation(x, bias)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    (expected.sum() + found.sum()).backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0, atol=2e-6)
    assert (found.double() - torch.nn.functional.gelu(wide)).abs().max() > 4e-4


@pytest.mark.slow
def test_gelu_is_the_exact_one_and_half_precision_compiles() -> None:
    """The tanh approximation is off by up to 4.7e-4. Both biases have the same gradient in the sum."""
    pointwise = Pointwise(ModelConfig(), TrainingConfig(compile=True))
    x = torch.linspace(-6, 6, 4096)[:, None]
    exact = 0.5 * x.double() * (1 + torch.erf(x.double() / 2**0.5))
    torch.testing.assert_close(pointwise.activation(x, torch.zeros(1)).double(), exact, rtol=0, atol=1e-6)
    half = torch.cat((x, torch.tensor([[-40.0], [-1e-3], [0.0], [40.0], [3e38]]))).bfloat16().requires_grad_()
    x = x.double()
    distribution, density = normal(x)
    torch.testing.assert_close(x * distribution, exact, rtol=0, atol=2.2e-7)
    torch.testing.assert_close(density, (-0.5 * x**2).exp() / (2 * torch.pi) ** 0.5)
    # Rounded to bf16 once, and no further off than that.
    limits = {"rtol": 2**-8, "atol": 1e-6}
    found = pointwise.activation(half, torch.zeros(1).bfloat16())
    found.sum().backward()
    wide = half.detach().double().requires_grad_()
    (0.5 * wide * torch.special.erfc(-wide / 2**0.5)).sum().backward()
    value = 0.5 * wide.detach() * torch.special.erfc(-wide.detach() / 2**0.5)
    torch.testing.assert_close(found.double(), value, **limits)
    torch.testing.assert_close(half.grad.double(), wide.grad, **limits)
    generator = torch.Generator().manual_seed(0)
    residual, left, right = torch.randn(3, 8, 64, generator=generator).bfloat16().requires_grad_().unbind()
    biases = torch.randn(2, 64, generator=generator).bfloat16().requires_grad_()
    total = pointwise.add_both(residual, left, biases[0], right, biases[1])
    total.float().square().sum().backward()
    expected = residual.float() + left.float() + right.float() + biases.float().sum(0)
    torch.testing.assert_close(total.float(), expected, rtol=2**-8, atol=0)
    torch.testing.assert_close(biases.grad, (2 * expected.sum(0)).bfloat16().expand(2, -1), rtol=0.02, atol=0.05)

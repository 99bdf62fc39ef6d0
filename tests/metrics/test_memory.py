"""The memory estimate against what autograd really keeps, and its arithmetic across layouts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sepllm_train.config.schema import ModelConfig, ParallelConfig, TrainingConfig
from sepllm_train.metrics.flops import parameter_count
from sepllm_train.metrics.memory import memory_estimate

PYTHIA = ModelConfig(layers=4, hidden=128, heads=4, ffn=512)
SEQUENTIAL = ModelConfig(layers=3, hidden=128, heads=4, ffn=512, parallel_residual=False)
VOCABULARY, LENGTH = 512, 256


def kept_by_autograd(network: torch.nn.Module, tokens: torch.Tensor) -> int:
    """Bytes of the tensors that the forward pass keeps for the backward, parameters aside, each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = network(tokens)
    assert torch.isfinite(loss)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("model", [PYTHIA, SEQUENTIAL], ids=["parallel_residual", "sequential"])
def test_activations_are_what_autograd_keeps(
    model: ModelConfig, small_transformer: Callable, random_tokens: Callable
) -> None:
    training = TrainingConfig(micro_batch=2, precision="fp32")
    estimate = memory_estimate(model, VOCABULARY, ParallelConfig(), training, LENGTH)
    measured = kept_by_autograd(small_transformer(model, VOCABULARY), random_tokens(VOCABULARY, 2, LENGTH))
    # The loss of the small model keeps the log-softmax only, not the logits as well.
    measured += 4 * VOCABULARY * 2 * LENGTH
    assert estimate["activations"] == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(("precision", "per_parameter"), [("fp32", 16), ("bf16", 18), ("fp16", 18)])
def test_bytes_per_parameter(precision: str, per_parameter: int) -> None:
    training = TrainingConfig(micro_batch=1, precision=precision)
    estimate = memory_estimate(PYTHIA, VOCABULARY, ParallelConfig(), training, LENGTH)
    held = estimate["weights"] + estimate["gradients"] + estimate["optimizer"]
    assert held == per_parameter * parameter_count(PYTHIA, VOCABULARY)
    assert estimate["total"] == held + estimate["activations"]


def test_recompute_keeps_one_hidden_state_per_layer() -> None:
    def activations(recompute: str, layers: int) -> int:
        model = ModelConfig(layers=layers, hidden=128, heads=4, ffn=512)
        training = TrainingConfig(micro_batch=3, recompute=recompute)
        return memory_estimate(model, VOCABULARY, ParallelConfig(), training, LENGTH)["activations"]

    tokens = 3 * LENGTH
    assert activations("full", 9) - activations("full", 8) == 2 * 128 * tokens
    none, selective = (activations(mode, 9) - activations(mode, 8) for mode in ("none", "selective"))
    assert none - selective == (4 * 4 + 2 * 2 * 128) * tokens
    assert none == (2 * (128 * (1 + 2 + 4) + 2 * 512) + 4 * 4) * tokens


def test_layouts_shrink_what_they_shard() -> None:
    """Two stages halve the weights of a rank but not its activations; sequence parallelism halves both."""
    model = ModelConfig(layers=64, hidden=1024, heads=16, ffn=4096)
    training = TrainingConfig(micro_batch=2)

    def estimate(**layout: int | bool) -> dict[str, int]:
        return memory_estimate(model, VOCABULARY, ParallelConfig(**layout), training, LENGTH)

    alone, tensor, pipeline = estimate(), estimate(tensor=2), estimate(pipeline=2)
    sequence, interleaved = estimate(tensor=2, sequence=True), estimate(pipeline=2, virtual_pipeline=2)
    assert tensor["weights"] == pytest.approx(alone["weights"] / 2, rel=0.01)
    assert pipeline["weights"] == pytest.approx(alone["weights"] / 2, rel=0.01)
    assert pipeline["activations"] == pytest.approx(alone["activations"], rel=0.01)
    assert interleaved["activations"] == pytest.approx(1.25 * pipeline["activations"], rel=1e-6)
    assert sequence["activations"] == pytest.approx(alone["activations"] / 2, rel=1e-6)
    assert sequence["activations"] < tensor["activations"] < alone["activations"]

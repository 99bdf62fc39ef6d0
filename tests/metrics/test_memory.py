"""The memory estimate against what a real forward pass keeps, and its arithmetic across layouts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sepllm_train.attention_pattern import resolve_pattern
from sepllm_train.config.schema import (
    AttentionConfig,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
)
from sepllm_train.distributed.launch import Launch, process_grid
from sepllm_train.metrics.flops import parameter_count
from sepllm_train.metrics.memory import memory_estimate

PYTHIA = ModelConfig(layers=4, hidden=128, heads=4, ffn=512)
# LayerNorm, because torch computes RMSNorm on a CPU from parts, each of which keeps something.
LLAMA = ModelConfig(
    layers=3,
    hidden=128,
    heads=4,
    kv_heads=2,
    ffn=320,
    parallel_residual=False,
    activation="swiglu",
    bias=False,
    rotary_fraction=1.0,
    tied_embeddings=True,
)
VOCABULARY, LENGTH = 640, 1024


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """The device of a single-process grid."""
    with process_grid(Config(), Launch(rank=0, world_size=1, local_rank=0, by_torchrun=False)) as device:
        from megatron.core import parallel_state

        yield device
        parallel_state.destroy_model_parallel()


def kept_for_the_backward_pass(config: Config, device: torch.device) -> int:
    """Bytes of what a forward pass of the real model keeps, parameters aside, each storage once."""
    from sepllm_train.model.build import build_model

    model = build_model(config, VOCABULARY).to(device)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    shape = (config.training.micro_batch, LENGTH)
    tokens = torch.randint(VOCABULARY, shape, device=device)
    classes = (torch.rand(shape, device=device) < 0.1).to(torch.uint8)
    plan = resolve_pattern(config.attention, config.model.layers).plan(classes, torch.zeros_like(tokens).int())
    positions = torch.arange(LENGTH, device=device).expand(shape)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(tokens, positions, plan, labels=tokens)
    assert losses.isfinite().all()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [PYTHIA, LLAMA], ids=["pythia", "llama"])
def test_activations_are_what_a_forward_pass_keeps(
    model: ModelConfig, precision: str, recompute: str, device: torch.device
) -> None:
    config = Config(
        model=model,
        attention=AttentionConfig(backend="blocked"),
        data=DataConfig(sequence_length=LENGTH),
        training=TrainingConfig(micro_batch=2, precision=precision, recompute=recompute),
    )
    measured = kept_for_the_backward_pass(config, device)
    # The half-precision logits are there until the loss is known, but nothing keeps them for the backward pass.
    measured += 0 if precision == "fp32" else 2 * VOCABULARY * 2 * LENGTH
    estimate = memory_estimate(model, VOCABULARY, config.parallel, config.training, LENGTH)
    if recompute == "selective":  # the MLP of one layer at a time comes back in the backward pass
        repeated = model.ffn * (5 if model.activation == "swiglu" else 2) * (4 if precision == "fp32" else 2)
        measured += repeated * 2 * LENGTH
    # Left out of the estimate: statistics of the norms and tables of the rotary embedding.
    assert estimate["activations"] == pytest.approx(measured, rel=0.04)


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
    assert none - selective == 2 * 2 * 512 * tokens
    assert none == (2 * (128 * (1 + 2 + 3 + 2 + 1) + 2 * 512) + 4 * 4) * tokens


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

"""The memory estimate against the peak of real training steps, and its arithmetic across layouts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sep_attention import attended_pairs

from sepllm_train.config.schema import Config, ModelConfig, ParallelConfig, TrainingConfig
from sepllm_train.config.validate import data_parallel_size
from sepllm_train.distributed.launch import Launch, process_grid
from sepllm_train.metrics.flops import parameter_count
from sepllm_train.metrics.memory import memory_estimate
from sepllm_train.model.pattern import resolve_pattern
from tests.metrics.peak_bytes import (
    LLAMA,
    PYTHIA,
    PYTHIA14M,
    allocator_peak,
    configuration,
    measured_peak,
    peaks_of_layouts,
    random_batches,
    train_two_steps,
)
from tests.support.distributed_runner import run_ranks

TOLERANCE = 0.05
# Interleaved stages hold fractions of micro-batches, and gloo copies what it exchanges.
LAYOUT_TOLERANCE = 0.10
VOCABULARY = 2048


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """The device of a single-process grid."""
    with process_grid(Config(), Launch(rank=0, world_size=1, local_rank=0, by_torchrun=False)) as device:
        from megatron.core import parallel_state

        yield device
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize(
    ("model", "vocabulary", "training", "pattern"),
    [
        (PYTHIA, VOCABULARY, {"precision": "fp32"}, "sep"),
        (PYTHIA, VOCABULARY, {"precision": "fp32", "recompute": "selective"}, "sep"),
        (PYTHIA, VOCABULARY, {"precision": "bf16"}, "dense"),
        (PYTHIA, 256, {"precision": "fp32", "recompute": "full"}, "sep"),
        (PYTHIA14M, 8192, {"precision": "fp32"}, "sep"),
        (PYTHIA14M, 8192, {"precision": "bf16", "recompute": "full"}, "sep"),
        (LLAMA, VOCABULARY, {"precision": "fp32"}, "sep"),
        (LLAMA, 256, {"precision": "bf16"}, "dense"),
        (LLAMA, 256, {"precision": "bf16", "recompute": "selective"}, "sep"),
        (PYTHIA, 8192, {"precision": "fp32", "loss_chunk": 128}, "sep"),
        (PYTHIA14M, 8192, {"precision": "bf16", "loss_chunk": 100}, "sep"),
        (LLAMA, 8192, {"precision": "bf16", "recompute": "full", "loss_chunk": 32}, "sep"),
        (PYTHIA | {"tied_embeddings": True}, 8192, {"precision": "bf16", "micro_batch": 1, "global_batch": 2}, "sep"),
    ],
)
def test_estimate_is_what_training_takes(
    model: dict[str, Any], vocabulary: int, training: dict[str, Any], pattern: str, device: torch.device
) -> None:
    config = configuration(model, training, pattern=pattern)
    estimate = memory_estimate(config, vocabulary, device="cpu")
    assert estimate["total"] == pytest.approx(measured_peak(config, vocabulary, 1, device), rel=TOLERANCE)


def test_measured_peak_is_the_allocators(device: torch.device) -> None:
    """The measure itself: what follows tensors sees all that the allocator hands out."""
    config = configuration(PYTHIA14M, {"precision": "fp32"}, pattern="sep")
    measured = measured_peak(config, VOCABULARY, 1, device)
    assert measured == pytest.approx(allocator_peak(config, VOCABULARY, device), rel=0.02)


@pytest.mark.slow
@pytest.mark.slow
def test_estimate_of_compiled_training(device: torch.device, compile_cache: None) -> None:
    """Compiled functions allocate past the operations that the other tests follow, so the allocator is asked."""
    config = configuration(LLAMA, {"precision": "fp32", "compile": True}, pattern="sep")
    estimate = memory_estimate(config, VOCABULARY, device="cpu")
    train_two_steps(config, VOCABULARY, 1, device)  # compiling allocates too
    assert estimate["total"] == pytest.approx(allocator_peak(config, VOCABULARY, device), rel=TOLERANCE)


def attended_share(config: Config) -> float:
    """Share of the causal triangle that a layer attends on random batches."""
    pattern, length = resolve_pattern(config.attention, config.model.layers), config.data.sequence_length
    batch = next(random_batches(config, VOCABULARY, 1))
    layer = pattern.layers[0]
    pairs = attended_pairs(
        pattern.plan(batch["separator_class"], batch["document_start"]), layer.window, layer.horizons
    )
    return float(pairs.double().mean()) / (length * (length + 1) / 2)


@pytest.mark.distributed
@pytest.mark.slow
def test_estimate_is_what_layouts_take() -> None:
    """The rank that takes the most, in layouts of two processes."""
    fp32, bf16 = {"precision": "fp32"}, {"precision": "bf16"}
    layouts: list[dict[str, Any]] = [
        {"model": PYTHIA, "training": fp32, "parallel": {"tensor": 2}, "pattern": "sep"},
        {"model": LLAMA, "training": bf16 | {"recompute": "full"}, "parallel": {"tensor": 2, "sequence": True}},
        {"model": PYTHIA, "training": fp32 | {"global_batch": 8}, "parallel": {"pipeline": 2}, "pattern": "sep"},
        {
            "model": PYTHIA,
            "training": fp32 | {"global_batch": 8},
            "parallel": {"pipeline": 2, "virtual_pipeline": 2},
            "pattern": "sep",
        },
        {
            "model": PYTHIA,
            "training": fp32 | {"global_batch": 8},
            "parallel": {"pipeline": 2, "first_stage_layers": 1},
            "pattern": "sep",
        },
        {
            "model": PYTHIA,
            "training": bf16 | {"global_batch": 4},
            "parallel": {"sharded_optimizer": True},
            "pattern": "sep",
        },
        {"model": LLAMA, "training": fp32, "parallel": {"context": 2}, "pattern": "sep"},
        {"model": PYTHIA, "training": bf16 | {"loss_chunk": 128}, "parallel": {"tensor": 2, "sequence": True}},
    ]
    ranks = run_ranks(peaks_of_layouts, 2, layouts=layouts, vocabulary=VOCABULARY)
    for number, layout in enumerate(layouts):
        config = configuration(**layout)
        replicas = data_parallel_size(config.parallel, 2)
        share = attended_share(config)
        estimate = memory_estimate(config, VOCABULARY, replicas=replicas, attended_share=share, device="cpu")["total"]
        assert estimate == pytest.approx(max(rank[number] for rank in ranks), rel=LAYOUT_TOLERANCE), layout


@pytest.mark.parametrize(("precision", "per_parameter"), [("fp32", 16), ("bf16", 18), ("fp16", 18)])
def test_bytes_per_parameter(precision: str, per_parameter: int) -> None:
    config = configuration(PYTHIA, {"precision": precision})
    estimate = memory_estimate(config, VOCABULARY)
    held = estimate["weights"] + estimate["gradients"] + estimate["optimizer"]
    assert held == per_parameter * parameter_count(config.model, VOCABULARY)
    assert estimate["total"] == held + estimate["activations"]


def test_layouts_shrink_what_they_shard() -> None:
    """Two stages halve the weights of a rank but not its activations; sequence parallelism halves both."""
    model = ModelConfig(layers=64, hidden=1024, heads=16, ffn=4096)
    training = TrainingConfig(micro_batch=2)

    def estimate(**layout: int | bool) -> dict[str, int]:
        return memory_estimate(Config(model=model, parallel=ParallelConfig(**layout), training=training), VOCABULARY)

    alone, tensor, pipeline = estimate(), estimate(tensor=2), estimate(pipeline=2)
    sequence, interleaved = estimate(tensor=2, sequence=True), estimate(pipeline=2, virtual_pipeline=2)
    assert tensor["weights"] == pytest.approx(alone["weights"] / 2, rel=0.01)
    assert pipeline["weights"] == pytest.approx(alone["weights"] / 2, rel=0.01)
    assert pipeline["activations"] == pytest.approx(alone["activations"], rel=0.03)
    assert interleaved["activations"] == pytest.approx(1.25 * pipeline["activations"], rel=0.01)
    assert sequence["activations"] == pytest.approx(alone["activations"] / 2, rel=0.02)
    assert sequence["activations"] < tensor["activations"] < alone["activations"]

"""Two optimizer steps of tiny models in layouts of processes; run through distributed_runner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from sepllm_train.base.quiet import quiet
from sepllm_train.config.rotary import RotaryScalingConfig
from sepllm_train.config.schema import Config, OptimConfig
from sepllm_train.distributed.launch import Launch, launch_from_environment, model_parallel, process_grid
from sepllm_train.model.pattern import resolve_pattern
from tests.model.tiny import LENGTH, LLAMA, PYTHIA, VOCABULARY, micro_batch, tiny_config

with quiet():
    from megatron.core import parallel_state

    from sepllm_train.training.setup import build_training
    from sepllm_train.training.step import Stepper, reduce_over_ranks

YARN = RotaryScalingConfig("yarn", factor=4.0, original_max_position_embeddings=12, beta_fast=8.0)
DOCUMENTS = "restarted positions, masked labels"
# (model, attention) of each row of the table.
PATTERNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": (PYTHIA, {"pattern": "dense"}),
    "sep": (PYTHIA, {}),
    "first and last layer full": (PYTHIA, {"full_layers": "first_last"}),
    "windows, documents, sinks": (
        PYTHIA,
        {"window": [1, 3, 9, 27], "separate_documents": True, "sink": "learned"},
    ),
    "grouped queries, query-key norm": (LLAMA, {"qk_norm": True}),
    "scaled positions": (LLAMA | {"rotary_scaling": YARN}, {}),
    "tied embeddings": (LLAMA | {"tied_embeddings": True}, {}),
    # Attention across documents: within them, positions that run on would do as well.
    DOCUMENTS: (PYTHIA, {"restart_positions": True, "full_layers": "first"}),
}
MICRO_BATCHES = 4


def train_all(layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train in each of `layouts` ({parallel, training, patterns}) every pattern, or those that it names; gives
    {pattern: result of `train`} of each layout."""
    launch = launch_from_environment()
    results = []
    with process_grid(tiny_config(), launch) as device:
        parallel_state.destroy_model_parallel()
        for layout in layouts:
            settings = {"parallel": layout.get("parallel"), "training": layout.get("training")}
            with model_parallel(tiny_config(**settings), device):
                results.append(
                    {
                        pattern: train(config_of(pattern, **settings), launch, device)
                        for pattern in layout.get("patterns", PATTERNS)
                    }
                )
        parallel_state.initialize_model_parallel()
    return results


def config_of(pattern: str, **settings: Any) -> Config:
    """The configuration of a row; labels are masked, unequally many in each micro-batch, where it is DOCUMENTS."""
    config = tiny_config(*PATTERNS[pattern], **settings)
    return replace(config, data=replace(config.data, mask_boundary_loss=pattern == DOCUMENTS))


def train(config: Config, launch: Launch, device: torch.device) -> dict[str, Any]:
    """Train on MICRO_BATCHES micro-batches a step, shared among the replicas.

    Gives mean loss, gradient norm, visible pairs and bytes sent for context parallelism of each step, the validation
    losses afterwards, and the sinks' places in a distributed checkpoint.
    """
    torch.manual_seed(0)
    config.optim = OptimConfig(
        lr=1e-2, min_lr=0.0, epsilon=1e-3, schedule="constant", warmup_fraction=0.0, clip_grad=1.0, weight_decay=0.1
    )
    training = build_training(config, VOCABULARY, device)
    stepper = Stepper(config, resolve_pattern(config.attention, config.model.layers), training, device)
    replicas = launch.world_size // config.parallel.processes
    numbers = range(parallel_state.get_data_parallel_rank(), MICRO_BATCHES, replicas)

    def batches() -> list[Iterator[dict[str, torch.Tensor]]]:
        """The same micro-batches for each model chunk."""
        return [map(_batch, [config] * len(numbers), numbers) for _ in training.chunks]

    result: dict[str, Any] = {"losses": [], "norms": [], "pairs": [], "context_bytes": []}
    for _ in range(2):
        step = stepper.train(batches(), len(numbers), lambda number: None)
        sums = torch.stack((step.loss, step.counted, step.pairs.double()))
        loss, count, pairs, sent = reduce_over_ranks(sums, step.context_bytes)
        assert (count == MICRO_BATCHES) != config.data.mask_boundary_loss
        assert loss / count == pytest.approx(step.mean_loss, abs=1e-12)
        result["losses"].append(loss / count)
        result["norms"].append(step.grad_norm)
        result["pairs"].append(pairs)
        result["context_bytes"].append(sent)
    result["validation"] = list(stepper.validate(batches(), len(numbers), torch.full((VOCABULARY,), 2)))
    return result | {"sinks": [place for module in training.modules for place in _sinks(module)]}


def _batch(config: Config, number: int) -> dict[str, torch.Tensor]:
    """A micro-batch as the data loader gives it."""
    made = micro_batch(config, seed=number)
    batch = {
        "tokens": made.tokens,
        "labels": made.labels,
        "separator_class": made.classes,
        "document_start": made.document_start,
        "counted": torch.ones(len(made.tokens)),
    }
    return batch | unequal_documents(number, len(made.tokens)) if config.data.mask_boundary_loss else batch


def unequal_documents(number: int, batch: int) -> dict[str, torch.Tensor]:
    """`document_start` and `loss_mask` [batch, LENGTH] of documents that are longer in each row and micro-batch: of one
    token in the first, which counts no label."""
    length = (torch.arange(batch)[:, None] * 3 + 7 * number + 1).int()
    start = torch.arange(LENGTH + 1, dtype=torch.int32) // length * length
    return {"document_start": start[:, :-1], "loss_mask": start[:, 1:] == start[:, :-1]}


def _sinks(module: Any) -> list[Any]:
    """(global shape, global offset) of each sink of a model chunk, [layers, heads]."""
    shards = module.sharded_state_dict()
    return [(list(s.global_shape), list(s.global_offset)) for key, s in shards.items() if key.endswith("sink")]

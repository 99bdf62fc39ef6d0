"""Checks that need more than one group of the configuration, before any process group or GPU work."""

from __future__ import annotations

import os

import torch

from sepllm_train.config.schema import Config, ParallelConfig, require


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Replicas of the model: world size / (TP x PP). Raises UserError when that is not whole."""
    grid = parallel.tensor * parallel.pipeline
    require(
        world_size % grid == 0,
        f"a world of size {world_size} cannot be split into parallel.tensor={parallel.tensor} x "
        f"parallel.pipeline={parallel.pipeline}: start a multiple of {grid} processes (torchrun --nproc-per-node).",
    )
    return world_size // grid


def validate(config: Config, world_size: int) -> None:
    """Check the groups against each other for a run of `world_size` processes. Raises UserError."""
    _check_grid(config)
    replicas = data_parallel_size(config.parallel, world_size)
    batch, micro = config.training.global_batch, config.training.micro_batch
    require(
        batch % (micro * replicas) == 0,
        f"training.global_batch={batch} must be a multiple of training.micro_batch={micro} x {replicas} "
        "data-parallel replicas.",
    )
    chunks = config.parallel.virtual_pipeline or 1
    require(
        chunks == 1 or (batch // (micro * replicas)) % config.parallel.pipeline == 0,
        f"parallel.virtual_pipeline={chunks} needs the {batch // (micro * replicas)} micro-batches of a step to be a "
        f"multiple of parallel.pipeline={config.parallel.pipeline}.",
    )
    optim, steps = config.optim, config.training.steps
    require(
        optim.warmup_steps is None or 0 <= optim.warmup_steps <= steps,
        f"optim.warmup_steps={optim.warmup_steps} must lie between 0 and training.steps={steps}.",
    )
    decay = optim.decay_fraction * steps if optim.schedule == "wsd" else 0
    require(
        optim.warmup_steps is None or optim.warmup_steps + decay <= steps,
        f"optim.warmup_steps={optim.warmup_steps} reach into the decay, the last optim.decay_fraction="
        f"{optim.decay_fraction} of training.steps={steps}.",
    )
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    require(gpus == 0 or local <= gpus, f"{local} processes were started on a node of {gpus} GPUs: one each is needed.")


def _check_grid(config: Config) -> None:
    """Model dimensions against tensor and pipeline sizes."""
    model, parallel = config.model, config.parallel
    for key, value in (("heads", model.heads), ("kv_heads", model.query_groups), ("ffn", model.ffn)):
        require(
            value % parallel.tensor == 0,
            f"parallel.tensor={parallel.tensor} must divide model.{key}={value}.",
        )
    stages = parallel.pipeline * (parallel.virtual_pipeline or 1)
    require(
        model.layers % stages == 0,
        f"model.layers={model.layers} must be a multiple of parallel.pipeline x parallel.virtual_pipeline = {stages}.",
    )
    require(
        not parallel.sequence or config.data.sequence_length % parallel.tensor == 0,
        f"parallel.sequence=true needs data.sequence_length={config.data.sequence_length} to be a multiple of "
        f"parallel.tensor={parallel.tensor}.",
    )
    require(
        not (config.model.tied_embeddings and parallel.virtual_pipeline not in (None, 1)),
        "model.tied_embeddings=true cannot be used with parallel.virtual_pipeline.",
    )

"""A trained run to generate from, in any number of tensor-parallel processes."""

from __future__ import annotations

from dataclasses import replace

import torch

from sepllm_train.config.schema import Config, LoggingConfig, ParallelConfig, require
from sepllm_train.config.validate import validate
from sepllm_train.model.build import check_model
from sepllm_train.model.gpt import SepGPTModel
from sepllm_train.runs.source import Source
from sepllm_train.training.checkpoint import load_model


def config_for(config: Config, tensor: int, world_size: int) -> Config:
    """A run's configuration for generation in `tensor` processes, whatever layout it was trained in.

    Raises UserError when there are `world_size` processes instead, or the model cannot be split so.
    """
    require(tensor >= 1, f"--tensor {tensor} must be at least 1.")
    require(
        world_size == tensor,
        f"--tensor {tensor} takes {tensor} processes and {world_size} were started: "
        f"torchrun --nproc-per-node={tensor} -m sepllm_train generate ... --tensor {tensor}"
        + (", or python alone." if tensor == 1 else "."),
    )
    config = replace(
        config,
        parallel=ParallelConfig(tensor=tensor),
        training=replace(config.training, recompute="none", compile=False, loss_chunk=0),
        logging=LoggingConfig(),
    )
    validate(config, world_size)
    check_model(config)
    return config


def load_run(source: Source, config: Config, device: torch.device) -> SepGPTModel:
    """The model of a run with its weights, in the process grid of `config`, by `config_for`. Every rank calls it.

    Raises UserError when the checkpoint cannot be loaded.
    """
    return load_model(source.checkpoint, config, source.vocabulary, device)

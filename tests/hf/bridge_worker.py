"""Logits of an imported checkpoint in a tensor-parallel layout; run through distributed_runner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sepllm_train.config.schema import ParallelConfig
from sepllm_train.distributed.launch import launch_from_environment, process_grid
from sepllm_train.model.build import build_model
from sepllm_train.model.pattern import resolve_pattern
from sepllm_train.runs.open import find_checkpoint, read_config
from sepllm_train.training.checkpoint import load_weights


def split_logits(folder: str, tokens: list[int], tensor: int) -> Any:
    """This rank's part of the logits of the last of `tokens` under full attention."""
    config = replace(read_config(Path(folder)), parallel=ParallelConfig(tensor=tensor))
    assert config.model.vocabulary is not None
    with process_grid(config, launch_from_environment()):
        model = build_model(config, config.model.vocabulary)
        load_weights(find_checkpoint(Path(folder)), [model])
        model.eval()
        ids = torch.tensor([tokens])
        plan = resolve_pattern(config.attention, config.model.layers).plan(ids.byte() * 0, ids.int() * 0)
        with torch.no_grad():
            return model(ids, plan)[0, -1].clamp(min=-1e9).tolist()

"""Generation in a tensor-parallel layout; run through distributed_runner."""

from __future__ import annotations

from typing import Any

import torch

from sepllm_train.distributed.launch import launch_from_environment, process_grid
from sepllm_train.generation.generate import generate
from sepllm_train.generation.native import NativeCache
from sepllm_train.generation.sampling import Sampling
from sepllm_train.generation.slots import CachePolicy
from tests.generation.native_models import random_ids, run_config, token_pattern, trained
from tests.model.tiny import tiny_config

NAMES = ("pythia", "llama, grouped queries, norms, sinks")


def tensor_parallel_results(tensor: int) -> dict[str, Any]:
    """Sampled tokens of two prompts and the logits after one of them, of each model. A grid of one is there already."""
    if tensor == 1:
        return {name: _result(name, tensor) for name in NAMES}
    with process_grid(tiny_config(parallel={"tensor": tensor}), launch_from_environment()):
        return {name: _result(name, tensor) for name in NAMES}


def _result(name: str, tensor: int) -> dict[str, Any]:
    config = run_config(name, parallel={"tensor": tensor})
    model, pattern = trained(config), token_pattern(config)
    policies = [CachePolicy(window=6, initial=2, separators=4, capacity=20)] * 4
    prompts = [random_ids(30), random_ids(11, seed=1)]
    cache = NativeCache(model, pattern, policies, 2, positions="cache")
    found = generate(cache, prompts, 25, Sampling(temperature=0.7, top_p=0.95, seed=3))
    logits = NativeCache(model, pattern, policies, 1, positions="cache").feed(torch.tensor(prompts[:1]))
    return {"tokens": [one.tokens for one in found], "logits": logits[0].tolist()}

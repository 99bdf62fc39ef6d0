"""Runs whose batch grows, and what they must have counted and computed; run through distributed_runner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sepllm_train.data.corpus import open_corpus
from sepllm_train.data.splits import build_datasets
from sepllm_train.distributed.launch import device_of, launch_from_environment, model_parallel, reading_group
from sepllm_train.model.pattern import resolve_pattern
from sepllm_train.suite.timing import figures_of
from sepllm_train.training.checkpoint import load
from sepllm_train.training.rounds import build_timed_run, interleave
from sepllm_train.training.setup import build_training, learning_rate
from sepllm_train.training.step import Stepper
from tests.training.resume_worker import small_run, train_all
from tests.training.schedules_worker import by_hand, pairs_of, records

VOCABULARY = 4096


def train_and_count(
    root: str, cache: str, runs: list[dict[str, Any]], batches: list[int], lengths: list[int]
) -> dict[str, Any]:
    """What `train_all` gives with the `records` of each run, and what the first of them must have come to.

    `batches` and `lengths` are those of its steps. `pairs`: visible pairs of each step, from masks over its samples.
    `steps`: [loss, gradient norm, learning rate] of each step after the first, taken from the checkpoint before it with
    the whole batch in one micro-batch. `timing`: its figures in timing.json.
    """
    found = train_all(root, cache, runs)
    for name, result in found.items():
        result["records"] = records(Path(root) / name)
    config = small_run(root, cache, **runs[0])
    launch = launch_from_environment()
    with reading_group(launch):
        dataset, _ = build_datasets(config, open_corpus(config.data))
        first = [sum(batches[:step]) for step in range(len(batches))]
        samples = [
            [by_hand(dataset[number], length) for number in range(begin, begin + batch)]
            for begin, batch, length in zip(first, batches, lengths, strict=True)
        ]
        found["pairs"] = [pairs_of(config, each, config.attention.window) for each in samples]
        device = device_of(launch)
        found["steps"] = []
        for step in range(1, len(batches)):
            whole = {key: torch.cat([sample[key] for sample in samples[step]]) for key in samples[step][0]}
            at_once = replace(
                config,
                data=replace(config.data, sequence_length=lengths[step]),
                training=replace(config.training, micro_batch=len(whole["tokens"])),
            )
            with model_parallel(at_once, device):
                training = build_training(config, VOCABULARY, device)
                load(Path(root) / config.name / "checkpoints" / f"step_{step:08d}", training)
                stepper = Stepper(at_once, resolve_pattern(config.attention, config.model.layers), training, device)
                rate = learning_rate(training.scheduler)
                result = stepper.train([iter([whole])], 1, lambda number: None)
                found["steps"].append([result.loss.item(), result.grad_norm, rate])
        with model_parallel(config, device):
            timed = build_timed_run(config, launch.world_size, device)
            list(interleave([timed], 2, 1, device))
            found["timing"] = {**figures_of(timed), "steps": timed.done}
    return found

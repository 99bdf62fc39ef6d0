"""Runs whose steps differ, and what their steps must have counted; run through distributed_runner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sep_attention.reference import visible_mask

from sepllm_train.data.corpus import open_corpus
from sepllm_train.data.splits import build_datasets
from sepllm_train.distributed.launch import launch_from_environment, reading_group
from sepllm_train.training.schedules import schedule_of
from tests.training.resume_worker import small_run, train_all


def train_and_count(root: str, cache: str, runs: list[dict[str, Any]], counted: str) -> dict[str, Any]:
    """What `train_all` gives, with the `records` of each run, and by step the pairs that the run `counted` must have
    counted (`pairs`), from masks over its samples."""
    found = train_all(root, cache, runs)
    for name, result in found.items():
        lines = (Path(root) / name / "metrics.jsonl").read_text().splitlines()
        result["records"] = [json.loads(line) for line in lines]
    if found:
        found[counted]["pairs"] = pairs_of_steps(root, cache, next(run for run in runs if run["name"] == counted))
    return found


def pairs_of_steps(root: str, cache: str, run: dict[str, Any]) -> list[int]:
    """Visible pairs of each step, summed over sequences and layers."""
    config = small_run(root, cache, **run)
    schedule, batch = schedule_of(config), config.training.global_batch
    with reading_group(launch_from_environment()):
        dataset, _ = build_datasets(config, open_corpus(config.data))
    pairs = []
    for step in range(config.training.steps):
        samples = [dataset[number] for number in range(step * batch, (step + 1) * batch)]
        plan = schedule.base.plan(
            *(torch.stack([s[key] for s in samples]) for key in ("separator_class", "document_start"))
        )
        layers = schedule.pattern(step + 1).layers
        pairs.append(sum(int(visible_mask(plan, layer.window, layer.horizons).sum()) for layer in layers))
    return pairs

"""Runs whose steps differ, and what they must have counted and computed; run through distributed_runner."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sep_attention import build_plan
from sep_attention.reference import visible_mask

from sepllm_train.config.schema import Config
from sepllm_train.data.corpus import open_corpus
from sepllm_train.data.splits import build_datasets
from sepllm_train.distributed.launch import Launch, device_of, launch_from_environment, model_parallel, reading_group
from sepllm_train.model.pattern import resolve_pattern
from sepllm_train.suite.timing import figures_of
from sepllm_train.training.rounds import build_timed_run, interleave
from sepllm_train.training.run import train
from sepllm_train.training.setup import build_training
from sepllm_train.training.step import Stepper
from tests.training.resume_worker import small_run, train_all

Batch = dict[str, torch.Tensor]


def train_and_count(
    root: str, cache: str, runs: list[dict[str, Any]], lengths: list[int], windows: list[int]
) -> dict[str, Any]:
    """What `train_all` gives with the `records` of each run, and what the first of them must have come to.

    `lengths` and `windows` are those of its steps. `pairs`: visible pairs of each step, from masks over its samples.
    `first`: loss and gradient norm of its first step, of a model with that window and length. `validation`: loss at the
    weights of its second checkpoint, of a run without schedules. `timing`: its figures in timing.json.
    """
    found = train_all(root, cache, runs)
    for name, result in found.items():
        result["records"] = records(Path(root) / name)
    config = small_run(root, cache, **runs[0])
    launch = launch_from_environment()
    plain = replace(config.attention, window_choices=None)
    with reading_group(launch):
        dataset, _ = build_datasets(config, open_corpus(config.data))
        size = config.training.global_batch
        batches = [
            [by_hand(dataset[number], length) for number in range(step * size, (step + 1) * size)]
            for step, length in enumerate(lengths)
        ]
        found["pairs"] = [pairs_of(config, *each) for each in zip(batches, windows, strict=True)]
        short = replace(
            config,
            attention=replace(plain, window=windows[0]),
            data=replace(config.data, sequence_length=lengths[0]),
            training=replace(
                config.training, micro_batch=len(batches[0][0]["tokens"]), global_batch=size, curriculum=[]
            ),
        )
        found["first"] = first_step(short, batches[0], launch)
        second = Path(root) / config.name / "checkpoints" / "step_00000002"
        after = replace(
            config,
            name="plain",
            init_from=str(second),
            attention=plain,
            training=replace(config.training, steps=1, curriculum=[]),
        )
        with model_parallel(after, device_of(launch)):
            train(after, launch, device_of(launch))
        found["validation"] = next(r["val/loss"] for r in records(Path(root) / "plain") if "val/loss" in r)
        with model_parallel(config, device_of(launch)):
            rival = build_timed_run(config, launch.world_size, device_of(launch))
            list(interleave([rival], 2, 1, device_of(launch)))
            found["timing"] = {**figures_of(rival), "steps": rival.done}
    return found


def records(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def by_hand(sample: Batch, length: int) -> Batch:
    """A sample cut into sequences, one slice after another."""
    pieces = []
    for begin in range(0, len(sample["tokens"]), length):
        piece = {key: entry[begin : begin + length] for key, entry in sample.items()}
        starts = [max(0, int(start) - begin) for start in piece["document_start"]]
        pieces.append({**piece, "document_start": torch.tensor(starts, dtype=torch.int32)})
    return {key: torch.stack([piece[key] for piece in pieces]) for key in pieces[0]}


def pairs_of(config: Config, batches: list[Batch], window: int) -> int:
    """Visible pairs of a step: full layers see all of a document before them, the others `window`."""
    base = resolve_pattern(config.attention, config.model.layers)
    pairs = 0
    for batch in batches:
        tier = torch.from_numpy(base.tier_of_class)[batch["separator_class"].long()]
        starts = batch["document_start"] if config.attention.separate_documents else None
        plan = build_plan(tier, initial_tokens=base.initial_tokens, document_start=starts, num_tiers=base.num_tiers)
        for layer in base.layers:
            pairs += int(visible_mask(plan, layer.window if layer.full else window, layer.horizons).sum())
    return pairs


def first_step(config: Config, batches: list[Batch], launch: Launch) -> list[float]:
    """(loss, gradient norm) of a model's first step."""
    device = device_of(launch)
    with model_parallel(config, device):
        training = build_training(config, 4096, device)
        stepper = Stepper(config, resolve_pattern(config.attention, config.model.layers), training, device)
        step = stepper.train([iter(batches)], len(batches), lambda number: None)
        return [step.mean_loss, step.grad_norm]

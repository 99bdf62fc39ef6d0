"""Small runs on the sample corpus, several layouts after another in one launch; run through distributed_runner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sepllm_train.cli.pretrain import tasks_of
from sepllm_train.config.schema import (
    AttentionConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainingConfig,
)
from sepllm_train.config.validate import validate
from sepllm_train.distributed.launch import (
    ALONE,
    device_of,
    launch_from_environment,
    model_parallel,
    process_grid,
    reading_group,
)
from sepllm_train.training.checkpoint import digests
from sepllm_train.training.run import train

STEPS, HALF = 3, 1


def small_run(root: str, cache: str, name: str, resume: str = "auto", **groups: dict[str, Any]) -> Config:
    """Steps of a model of 4 layers x 32 on the sample corpus, with a checkpoint after each."""
    training = {
        "steps": STEPS,
        "global_batch": 2,
        "micro_batch": 1,
        "precision": "fp32",
        "validation_interval": 0,
        "validation_samples": 0,
        "checkpoint_interval": HALF,
        "keep_checkpoints": STEPS,
    }
    model = {"name": "tiny", "layers": 4, "hidden": 32, "heads": 4, "ffn": 64}
    return Config(
        name=name,
        run_root=root,
        resume=resume,
        model=ModelConfig(**(model | groups.get("model", {}))),
        attention=AttentionConfig(**({"window": 8} | groups.get("attention", {}))),
        data=DataConfig(**({"sequence_length": 64, "cache": cache, "workers": 0} | groups.get("data", {}))),
        parallel=ParallelConfig(**groups.get("parallel", {})),
        optim=OptimConfig(**({"lr": 2e-3, "min_lr": 2e-4, "warmup_steps": 0} | groups.get("optim", {}))),
        training=TrainingConfig(**(training | groups.get("training", {}))),
        logging=LoggingConfig(interval=1),
        evaluation=EvaluationConfig(**groups.get("evaluation", {})),
    )


def train_alone(root: Path, cache: Path, name: str, **groups: dict[str, Any]) -> Path:
    """Train a `small_run` in this process; gives its folder."""
    config = small_run(str(root), str(cache), name, **groups)
    with process_grid(config, ALONE) as device, tasks_of(config) as tasks:
        train(config, ALONE, device, tasks)
    return Path(config.run_root) / config.name


def train_all(root: str, cache: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Train `runs` (arguments of `small_run`) one after another; gives what `described` says of each, by name.

    The grid of processes is built anew for each, the process group is not.
    """
    launch = launch_from_environment()
    with reading_group(launch):
        for run in runs:
            config = small_run(root, cache, **run)
            validate(config, launch.world_size)
            device = device_of(launch)
            with model_parallel(config, device), tasks_of(config) as tasks:
                train(config, launch, device, tasks)
        dist.barrier()
    return {run["name"]: described(Path(root) / run["name"]) for run in runs} if launch.main else {}


def described(folder: Path) -> dict[str, Any]:
    """Losses and gradient norms of a run, and what its last checkpoint holds: hashes by name of tensor or counter."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [r["train/loss"] for r in records if "train/loss" in r],
        "norms": [r["train/grad_norm"] for r in records if "train/grad_norm" in r],
        "state": dict(digests(folder)),
    }

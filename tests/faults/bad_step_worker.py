"""Runs whose loss is spoiled at chosen steps, on one rank; run through distributed_runner."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sepllm_train.base.errors import RunStopped
from sepllm_train.config.validate import validate
from sepllm_train.distributed.launch import device_of, launch_from_environment, model_parallel, reading_group
from sepllm_train.training.run import train
from sepllm_train.training.step import Stepper, StepResult
from tests.training.resume_worker import small_run


def train_spoiled(root: str, cache: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Train `runs` - {name, spoiled: {step: factor of the loss}, rank: where, other arguments of `small_run`} - one
    after another. Gives by name what happened on this rank: `changed` are the steps that changed weights or optimizer.
    """
    launch = launch_from_environment()
    outcomes: dict[str, Any] = {}
    with reading_group(launch):
        for run in runs:
            spoiled = {int(step): float(factor) for step, factor in run.pop("spoiled").items()}
            config = small_run(root, cache, **{key: value for key, value in run.items() if key != "rank"})
            validate(config, launch.world_size)
            device = device_of(launch)
            with model_parallel(config, device), spoiling(spoiled if launch.rank == run["rank"] else {}) as seen:
                try:
                    train(config, launch, device)
                except RunStopped as error:
                    seen["stopped"] = [error.code, str(error)]
            outcomes[run["name"]] = seen
        dist.barrier()
    return outcomes


@contextmanager
def spoiling(factors: dict[int, float]) -> Iterator[dict[str, Any]]:
    """Multiply this rank's losses of some steps, and their gradients, by a factor; record what each step did."""
    seen: dict[str, Any] = {"changed": [], "bad": {}, "rates": []}
    factor = 1.0
    step_of, loss_of = Stepper.train, Stepper._mean_loss

    def step(stepper: Stepper, *arguments: Any, **options: Any) -> StepResult:
        nonlocal factor
        number = stepper.training.scheduler.num_steps + 1
        factor = factors.get(number, 1.0)
        before = fingerprint(stepper)
        result = step_of(stepper, *arguments, **options)
        if fingerprint(stepper) != before:
            seen["changed"].append(number)
        if result.bad is not None:
            seen["bad"][number] = result.bad
        seen["rates"].append(result.learning_rate)
        return result

    def loss(stepper: Stepper, losses: torch.Tensor, loss_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, Any]:
        return loss_of(stepper, losses * factor, loss_mask)

    Stepper.train, Stepper._mean_loss = step, loss  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Stepper.train, Stepper._mean_loss = step_of, loss_of  # type: ignore[method-assign]


def fingerprint(stepper: Stepper) -> str:
    """Hash of this rank's weights, the optimizer's fp32 copies and its state; the loss scale of fp16 left out."""
    digest = hashlib.sha256()
    add: Callable[[torch.Tensor], None] = lambda tensor: digest.update(tensor.detach().float().numpy().tobytes())  # noqa: E731
    for module in stepper.training.modules:
        for parameter in module.parameters():
            add(parameter)
    for part in stepper.training.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                add(parameter)
        for state in part.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    add(state[name])
    return digest.hexdigest()


def checkpoint_of(root: str, name: str, step: int) -> str:
    """Folder of a checkpoint."""
    return str(Path(root) / name / "checkpoints" / f"step_{step:08d}")

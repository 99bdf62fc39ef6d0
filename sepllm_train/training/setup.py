"""Model, optimizer and schedule of a run, from megatron-core's parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

from sepllm_train.base.quiet import quiet
from sepllm_train.config.curriculum import schedule_position
from sepllm_train.config.param_groups import param_settings
from sepllm_train.config.schema import Config
from sepllm_train.distributed.launch import virtual_stages
from sepllm_train.model.build import PRECISIONS, build_model
from sepllm_train.model.initialization import global_names
from sepllm_train.training.muon import FUSED_ROWS, add_muon

SCHEDULES = {"cosine": "cosine", "pythia": "cosine", "linear": "linear", "constant": "constant", "wsd": "WSD"}


@dataclass
class Training:
    """Model chunks of this pipeline stage (wrapped), their bare modules, optimizer and schedule.

    `position`: place in the schedule after so many steps of the run, their number by default; `step` of them are done.
    """

    chunks: list[DistributedDataParallel]
    modules: list[Any]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    position: Callable[[int], int] = int
    step: int = 0


def build_training(config: Config, vocabulary: int, device: torch.device, *, draw: bool = True) -> Training:
    """Build this rank's part. `vocabulary` counts entries before padding; draw: see `build_model`."""
    modules = [build_chunk(config, vocabulary, stage, draw=draw).to(device) for stage in _stages(config)]
    half = config.training.precision in ("bf16", "fp16")
    model_config = get_model_config(modules[0])
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap,
        use_distributed_optimizer=config.parallel.sharded_optimizer,
    )
    wrapped = [Float16Module(model_config, module) if half else module for module in modules]
    chunks = [
        DistributedDataParallel(model_config, settings, module, disable_bucketing=number > 0)
        for number, module in enumerate(wrapped)
    ]
    # From 0.19 on megatron-core imports more of itself here, with its warnings.
    with quiet():
        optimizer = get_megatron_optimizer(_optimizer_config(config), chunks, _param_overrides(config, modules))
    _fuse_adam(optimizer)
    add_muon(optimizer, torch.float32 if config.training.precision == "fp32" else torch.bfloat16)
    model_config.grad_scale_func = optimizer.scale_loss
    model_config.finalize_model_grads_func = finalize_model_grads
    model_config.no_sync_func = chunks[0].no_sync if len(chunks) == 1 else [chunk.no_sync for chunk in chunks]
    training = Training(
        chunks,
        modules,
        optimizer,
        build_scheduler(config, optimizer),
        position=lambda step: schedule_position(config, config.optim.schedule_start + step),
    )
    set_schedule(training, 0)
    return training


def build_chunk(config: Config, vocabulary: int, stage: int | None, *, draw: bool = True) -> torch.nn.Module:
    """One model chunk of this pipeline stage."""
    return build_model(
        config,
        vocabulary,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        vp_stage=stage,
        draw=draw,
    )


def _stages(config: Config) -> list[int | None]:
    """Numbers of this rank's model chunks; [None] without an interleaved schedule."""
    chunks = virtual_stages(config)
    return list(range(chunks)) if chunks else [None]


def _optimizer_config(config: Config) -> OptimizerConfig:
    """Adam, with weight decay on matrices only (megatron-core's default)."""
    optim, precision = config.optim, config.training.precision
    lr, min_lr = optim.rates
    return OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.epsilon,
        clip_grad=optim.clip_grad,
        fp16=precision == "fp16",
        # megatron-core starts at 2**32, and skips the first dozen updates until that is halved often enough.
        initial_loss_scale=2.0**16,
        bf16=precision == "bf16",
        params_dtype=PRECISIONS[precision],
        use_distributed_optimizer=config.parallel.sharded_optimizer,
    )


def _param_overrides(config: Config, modules: list[Any]) -> dict[ParamKey, Any] | None:
    """Settings of parameters that have not those of `_optimizer_config`, as megatron-core groups them; None for its own
    groups, which differ in weight decay alone."""
    optim = config.optim
    if optim.optimizer == "adam" and not optim.groups:
        return None
    ids: dict[tuple[tuple[str, Any], ...], set[int]] = {}
    for module in modules:
        for name, parameter in global_names(module):
            overrides = _overrides(config, name, vector=parameter.dim() == 1)
            ids.setdefault(tuple(overrides.items()), set()).add(id(parameter))

    def key(overrides: tuple[tuple[str, Any], ...]) -> ParamKey:
        return ParamKey(predicate=ParamPredicate(str(overrides), lambda parameter: id(parameter) in ids[overrides]))

    return {key(overrides): dict(overrides) for overrides in ids if overrides}


def _overrides(config: Config, name: str, *, vector: bool) -> dict[str, Any]:
    """Settings that a parameter has of its own, as megatron-core's parameter groups name them; FUSED_ROWS for Muon."""
    model, settings = config.model, param_settings(config, name)
    overrides: dict[str, Any] = {}
    if settings.lr_factor != 1:
        lr, min_lr = config.optim.rates
        overrides |= {"max_lr": lr * settings.lr_factor, "min_lr": min_lr * settings.lr_factor}
    if settings.weight_decay is not None:
        overrides |= {"start_wd": float(settings.weight_decay), "end_wd": float(settings.weight_decay)}
    elif vector:
        overrides["wd_mult"] = 0.0
    if settings.optimizer == "muon":
        rows: tuple[int, ...] = ()
        if "linear_qkv" in name:
            rows = (model.heads // model.query_groups * model.head_dim, model.head_dim, model.head_dim)
        elif "linear_fc1" in name and model.activation == "swiglu":
            rows = (model.ffn // config.parallel.tensor,) * 2
        overrides[FUSED_ROWS] = rows
    return overrides


def _fuse_adam(optimizer: MegatronOptimizer) -> None:
    """Let torch's Adam, which megatron-core makes where it finds no other, update all tensors by one kernel."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.Adam):
            for group in part.optimizer.param_groups:
                group["fused"] = True


def build_scheduler(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Learning rate as a function of the step, or of the samples that were read (`schedule_position`)."""
    optim = config.optim
    steps = schedule_position(config, optim.schedule_steps or config.training.steps)
    warmup = round(optim.warmup_fraction * steps)
    if optim.warmup_steps is not None:
        warmup = schedule_position(config, optim.warmup_steps)
    lr, min_lr = optim.rates
    kind = PythiaScheduler if optim.schedule == "pythia" else OptimizerParamScheduler
    return kind(
        optimizer,
        init_lr=0.0,
        max_lr=lr,
        min_lr=min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(steps, warmup + 1),
        lr_decay_style=SCHEDULES[optim.schedule],
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        wsd_decay_steps=max(1, round(optim.decay_fraction * steps)) if optim.schedule == "wsd" else None,
        lr_wsd_decay_style="linear" if optim.schedule == "wsd" else None,
    )


class PythiaScheduler(OptimizerParamScheduler):
    """The schedule that Pythia was trained with, of GPT-NeoX before August 2023.

    After w steps of warm-up and k steps in all of T: lr / 2 (1 + cos(pi (n - w) / T)) with n = min(k, T - w), at least
    min_lr. So half a cosine to 0 over T steps, shifted by the warm-up; GPT-NeoX's later one, megatron-core's, goes from
    lr to min_lr in T - w steps.
    """

    def get_lr(self, param_group: dict) -> float:
        """Learning rate of a parameter group after `num_steps` steps."""
        warmup, total = self.lr_warmup_steps, self.lr_decay_steps
        if self.num_steps <= warmup:
            return super().get_lr(param_group)
        peak, least = (float(param_group.get(key, getattr(self, key))) for key in ("max_lr", "min_lr"))
        passed = min(self.num_steps, total - warmup) - warmup
        return max(peak / 2 * (math.cos(math.pi * passed / total) + 1), least)


def set_schedule(training: Training, step: int) -> None:
    """Put the schedule at `step` of the run: the learning rate depends on it alone, so checkpoints store none of it."""
    training.step = step
    training.scheduler.num_steps = 0
    training.scheduler.step(increment=training.position(step))


def learning_rate(scheduler: OptimizerParamScheduler) -> float:
    """Learning rate that the next step uses where optim.groups sets no lr_factor."""
    return float(scheduler.get_lr({}))

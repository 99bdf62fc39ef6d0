"""A wrong value gives a sentence that names its key."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sepllm_train.base.errors import UserError
from sepllm_train.config.rotary import RotaryScalingConfig
from sepllm_train.config.schema import (
    AttentionConfig,
    Config,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainingConfig,
)
from sepllm_train.config.validate import validate
from sepllm_train.model.pattern import resolve_pattern


def _scaling(**numbers: Any) -> RotaryScalingConfig:
    """YaRN with these numbers besides."""
    return RotaryScalingConfig(
        **{"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, **numbers}
    )


SMALL = TrainingConfig(steps=10, global_batch=8, micro_batch=2)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ModelConfig(layers=0), "model.layers=0"),
        (lambda: ModelConfig(hidden=100, heads=12), "model.hidden=100.*model.heads=12"),
        (lambda: ModelConfig(heads=12, kv_heads=5), "model.heads=12.*model.kv_heads=5"),
        (lambda: ModelConfig(norm="batchnorm"), "model.norm=batchnorm.*layernorm"),
        (lambda: ModelConfig(rotary_fraction=1.5), "model.rotary_fraction=1.5"),
        (lambda: ModelConfig(rotary_base=0), "model.rotary_base=0 must be at least 1"),
        (
            lambda: RotaryScalingConfig("yran", factor=2.0),
            "rotary_scaling.rope_type=yran is unknown .did you mean yarn.*llama3",
        ),
        (lambda: RotaryScalingConfig("dynamic", factor=2.0), "rope_type=dynamic has other frequencies.*take ntk"),
        (lambda: RotaryScalingConfig("linear"), "rope_type=linear needs model.rotary_scaling.factor"),
        (lambda: RotaryScalingConfig("linear", factor=0.5), "model.rotary_scaling.factor=0.5 must be at least 1"),
        (lambda: RotaryScalingConfig("ntk", factor=math.nan), "model.rotary_scaling.factor=nan must be a finite"),
        (lambda: RotaryScalingConfig("yarn", factor=2.0), "yarn needs model.rotary_scaling.original_max_position_emb"),
        (lambda: RotaryScalingConfig(factor=2.0), "factor=2.0 is of .*linear and ntk and yarn and llama3, not of None"),
        (lambda: RotaryScalingConfig("default", beta_fast=8.0), "beta_fast=8.0 is of .*rope_type yarn, not of None"),
        (lambda: _scaling(low_freq_factor=1.0), "low_freq_factor=1.0 is of .*rope_type llama3, not of yarn"),
        (lambda: _scaling(original_max_position_embeddings=0), "original_max_position_embeddings=0 must be at least 1"),
        (lambda: _scaling(beta_fast=0.5), "beta_fast=0.5 must be above model.rotary_scaling.beta_slow=1"),
        (lambda: _scaling(beta_slow=0.0), "beta_slow=0.0 must lie between 1e-6 and 1e6"),
        (lambda: RotaryScalingConfig("ntk", factor=1e300), "rotary_scaling.factor=1e.300 must lie between"),
        (lambda: _scaling(mscale=1.0), "mscale and model.rotary_scaling.mscale_all_dim are given together"),
        (lambda: _scaling(mscale=1.0, mscale_all_dim=1.0, attention_factor=1.0), "attention_factor=1.0 is what mscale"),
        (
            lambda: RotaryScalingConfig("llama3", 8.0, 64, low_freq_factor=4.0, high_freq_factor=4.0),
            "high_freq_factor=4 must be above model.rotary_scaling.low_freq_factor=4",
        ),
        (
            lambda: ModelConfig(rotary_fraction=0.0, rotary_scaling=_scaling()),
            "rope_type=yarn scales rotary positions, and model.rotary_fraction=0.0 has none",
        ),
        (
            lambda: ModelConfig(rotary_fraction=0.03125, rotary_scaling=RotaryScalingConfig("ntk", factor=2.0)),
            "rope_type=ntk needs more than 2 rotary features, not 2",
        ),
        (lambda: ModelConfig(rotary_base=1, rotary_scaling=_scaling()), "rope_type=yarn needs model.rotary_base above"),
        (lambda: ModelConfig(norm_epsilon=-1.0), "model.norm_epsilon=-1.0 must be above 0"),
        (lambda: ModelConfig(init_std=math.inf), "model.init_std=inf must be a finite number"),
        (lambda: AttentionConfig(window=0), "attention.window=0"),
        (lambda: AttentionConfig(window=[4, 0]), "attention.window"),
        (lambda: AttentionConfig(window=True), "attention.window"),
        (lambda: AttentionConfig(pattern="sparse"), "attention.pattern=sparse.*dense, sep, streaming, fixed"),
        (lambda: AttentionConfig(pattern="fixed"), "attention.interval"),
        (lambda: AttentionConfig(separators={"classes": ["comma"]}), "attention.separators"),
        (lambda: AttentionConfig(initial_tokens=-1), "attention.initial_tokens=-1"),
        (
            lambda: AttentionConfig(placement="random"),
            "attention.placement=random.*natural, shuffled, preceding, thinned",
        ),
        (
            lambda: AttentionConfig(placement="shuffled", pattern="fixed", interval=8),
            "attention.placement=shuffled.*attention.pattern=fixed has none",
        ),
        (
            lambda: AttentionConfig(placement="preceding", window=[64, 1]),
            r"attention.placement=preceding needs attention.window=\[64, 1\] to be at least 2",
        ),
        (lambda: AttentionConfig(placement="thinned"), "needs attention.keep_share above 0 and at most 1, not None"),
        (lambda: AttentionConfig(placement="thinned", keep_share=0.0), "attention.keep_share above 0.*not 0.0"),
        (lambda: AttentionConfig(placement="thinned", keep_share=1.5), "attention.keep_share.*at most 1, not 1.5"),
        (lambda: AttentionConfig(keep_share=0.5), "attention.keep_share=0.5 is of attention.placement=thinned"),
        (lambda: AttentionConfig(density_budget=[0.1]), r"attention.density_budget=\[0.1\] must be"),
        (lambda: AttentionConfig(density_budget=[0.2, 0.1]), r"density_budget=\[0.2, 0.1\] must be \[LEAST,MOST\]"),
        (lambda: AttentionConfig(density_budget=[0.5, 1.1]), "density_budget"),
        (lambda: DataConfig(source="prefixes"), "data.prefixes"),
        (lambda: DataConfig(prefixes=["a"]), "add data=prefixes"),
        (lambda: DataConfig(validation_fraction=1.0), "data.validation_fraction=1.0"),
        (lambda: ParallelConfig(tensor=0), "parallel.tensor=0"),
        (lambda: ParallelConfig(sequence=True), "parallel.tensor above 1"),
        (lambda: ParallelConfig(virtual_pipeline=2), "parallel.pipeline above 1"),
        (lambda: ParallelConfig(last_stage_layers=1), "parallel.last_stage_layers need parallel.pipeline above 1"),
        (
            lambda: ParallelConfig(pipeline=2, virtual_pipeline=2, first_stage_layers=1),
            "and no parallel.virtual_pipeline",
        ),
        (lambda: ParallelConfig(pipeline=2, first_stage_layers=0), "parallel.first_stage_layers=0"),
        (lambda: OptimConfig(lr=1e-4, min_lr=1e-3), "optim.lr=0.0001.*optim.min_lr=0.001"),
        (lambda: OptimConfig(schedule="step"), "optim.schedule=step"),
        (lambda: OptimConfig(beta2=1.0), "optim.beta2=1.0"),
        (lambda: OptimConfig(epsilon=-1.0), "optim.epsilon=-1.0 must be above 0"),
        (lambda: OptimConfig(lr=math.inf), "optim.lr=inf must be a finite number"),
        (lambda: TrainingConfig(spike_factor=math.inf), "training.spike_factor=inf must be a finite number"),
        (lambda: TrainingConfig(steps=0), "training.steps=0"),
        (lambda: TrainingConfig(precision="fp8"), "training.precision=fp8"),
        (lambda: TrainingConfig(recompute="some"), "training.recompute=some"),
        (lambda: LoggingConfig(interval=0), "logging.interval=0"),
        (lambda: LoggingConfig(peak_tflops=0.0), "logging.peak_tflops=0.0"),
        (lambda: LoggingConfig(peak_tflops=math.inf), "logging.peak_tflops=inf must be a finite number"),
        (lambda: ParallelConfig(timeout_seconds=math.inf), "parallel.timeout_seconds=inf must be a finite number"),
        (lambda: Config(seed=-1), "seed=-1 must be at least 0 and below"),
        (lambda: Config(seed=2**32), f"seed={2**32} must be"),
        (lambda: Config(name="a/b"), "name='a/b'"),
        (lambda: Config(name=""), "name=''"),
    ],
)
def test_value(build, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build()


@pytest.mark.parametrize(
    ("config", "world_size", "words"),
    [
        (Config(training=SMALL, parallel=ParallelConfig(tensor=5)), 5, "parallel.tensor=5 must divide model.heads=12"),
        (Config(training=SMALL, parallel=ParallelConfig(tensor=2)), 3, "size 3 cannot be split.*a multiple of 2"),
        (Config(training=SMALL), 3, "training.global_batch=8.*training.micro_batch=2 x 3"),
        (Config(training=SMALL, parallel=ParallelConfig(pipeline=5)), 5, "model.layers=12.*= 5"),
        (
            Config(training=SMALL, model=ModelConfig(kv_heads=1), parallel=ParallelConfig(tensor=2)),
            2,
            "model.kv_heads=1",
        ),
        (
            Config(training=SMALL, parallel=ParallelConfig(pipeline=3, virtual_pipeline=2)),
            3,
            "4 micro-batches.*parallel.pipeline=3",
        ),
        (Config(training=SMALL, optim=OptimConfig(warmup_steps=11)), 1, "optim.warmup_steps=11"),
        (
            Config(training=SMALL, optim=OptimConfig(schedule="wsd", decay_fraction=0.5, warmup_steps=6)),
            1,
            "optim.warmup_steps=6 reach into the decay",
        ),
        (
            Config(
                training=SMALL,
                data=DataConfig(sequence_length=127),
                parallel=ParallelConfig(tensor=2, sequence=True),
            ),
            2,
            "data.sequence_length=127",
        ),
        (Config(training=SMALL, parallel=ParallelConfig(context=2)), 3, "parallel.context=2: .*a multiple of 2"),
        (
            Config(training=SMALL, data=DataConfig(sequence_length=30), parallel=ParallelConfig(context=4)),
            4,
            "parallel.context=4 cuts sequences into 8 .*data.sequence_length=30 must be a multiple of 8",
        ),
        (
            Config(
                training=SMALL,
                data=DataConfig(sequence_length=28),
                parallel=ParallelConfig(context=2, tensor=3, sequence=True),
                model=ModelConfig(heads=3, hidden=96),
            ),
            6,
            "data.sequence_length=28 to be a multiple of parallel.context=2 x parallel.tensor=3",
        ),
    ],
)
def test_groups_against_each_other(config: Config, world_size: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(config, world_size)


def test_sequence_is_cut_by_context_then_tensor_ranks() -> None:
    config = Config(
        training=SMALL,
        data=DataConfig(sequence_length=24),
        parallel=ParallelConfig(context=2, tensor=3, sequence=True),
        model=ModelConfig(heads=3, hidden=96),
    )
    validate(config, world_size=6)


def test_all_mistakes_are_told_together() -> None:
    config = Config(
        training=SMALL,
        data=DataConfig(sequence_length=30),
        parallel=ParallelConfig(tensor=5, pipeline=5, context=4),
        optim=OptimConfig(warmup_steps=11),
    )
    with pytest.raises(UserError) as refused:
        validate(config, world_size=3)
    first, *mistakes = str(refused.value).splitlines()
    assert first == f"{len(mistakes)} settings do not fit:"
    named = ("model.heads=12", "model.ffn=3072", "model.layers=12", "sequence_length=30", "size 3", "warmup_steps=11")
    assert len(mistakes) == len(named)
    for mistake, words in zip(mistakes, named, strict=True):
        assert mistake.startswith("- ") and mistake.endswith(".") and words in mistake


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        (AttentionConfig(separators=["dot"]), "unknown separator class 'dot'.*period"),
        (AttentionConfig(separators="some"), "unknown separator class 'some'"),
        (AttentionConfig(separators="auto"), "attention.separators=auto is chosen from the statistics of the data"),
        (AttentionConfig(window=[4, 4, 4]), "3 windows for a model of 4 layers"),
        (AttentionConfig(full_layers=[4]), "layer 4; this model has layers 0 to 3"),
        (AttentionConfig(full_layers="last"), "attention.full_layers=last"),
        (AttentionConfig(full_layers=1), "attention.full_layers=1 must be"),
        (AttentionConfig(full_layers=[True]), "names layer True"),
        (AttentionConfig(separators=[["comma"]]), r"unknown separator class \['comma'\]"),
        (AttentionConfig(separators=[{"classes": ["comma"]}]), "horizon: TOKENS or forever"),
        (AttentionConfig(separators=[{"classes": ["comma"], "horizon": 0}]), "horizon 0"),
        (
            AttentionConfig(separators=[{"classes": ["comma"], "horizon": h} for h in (1, 2, 3, 4)]),
            "5 different horizons",
        ),
    ],
)
def test_pattern(attention: AttentionConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_pattern(attention, layers=4)


def test_layers_of_pipeline_stages() -> None:
    def stages(layers: int, **sizes: int) -> list[int]:
        return ParallelConfig(**sizes).stage_layers(layers)

    assert stages(12, pipeline=1) == [12]
    assert stages(12, pipeline=4) == [3, 3, 3, 3]
    assert stages(12, pipeline=4, first_stage_layers=2, last_stage_layers=2) == [2, 4, 4, 2]
    assert stages(11, pipeline=4, last_stage_layers=2) == [3, 3, 3, 2]
    assert stages(5, pipeline=2, first_stage_layers=3, last_stage_layers=2) == [3, 2]
    # Too many, a remainder, nothing left for the others.
    assert not stages(5, pipeline=2, first_stage_layers=3, last_stage_layers=3)
    assert not stages(12, pipeline=4, first_stage_layers=2)
    assert not stages(2, pipeline=3, first_stage_layers=2)
    words = "cannot be shared out over parallel.pipeline=4 stages with parallel.first_stage_layers=2"
    with pytest.raises(UserError, match=words):
        validate(Config(parallel=ParallelConfig(pipeline=4, first_stage_layers=2)), 4)


def test_a_value_with_line_breaks_is_shown_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^attention\.backend='a\\nb' is unknown: choose one of auto"):
        AttentionConfig(backend="a\nb")

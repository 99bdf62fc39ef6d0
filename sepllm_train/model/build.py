"""From the configuration to the model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from sepllm_train.base.errors import UserError
from sepllm_train.base.quiet import quiet
from sepllm_train.config.schema import Config, ModelConfig, ParallelConfig, require
from sepllm_train.model.gpt import SepGPTModel
from sepllm_train.model.initialization import initialize, mark_split
from sepllm_train.model.layers import layer_spec, norm_class
from sepllm_train.model.pattern import resolve_pattern
from sepllm_train.model.pointwise import Pointwise

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    # The MLP holds most of what a layer keeps; attention in blocks keeps next to nothing.
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def padded_vocabulary(entries: int, tensor: int) -> int:
    """Rows of the embedding: `entries` rounded up to a multiple of 128 x the tensor-parallel size."""
    multiple = 128 * tensor
    return -(-entries // multiple) * multiple


def transformer_config(config: Config) -> TransformerConfig:
    """megatron-core's settings for a run. Raises UserError for an odd number of rotary features."""
    training = config.training
    dtype = PRECISIONS[training.precision]
    with quiet():
        return TransformerConfig(
            **_block(config.model),
            **_split(config.parallel),
            **RECOMPUTE[training.recompute],
            qk_layernorm=config.attention.qk_norm,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=training.precision == "bf16",
            fp16=training.precision == "fp16",
            deterministic_mode=training.deterministic,
            # Parameters are filled by `initialize`, on the CPU.
            use_cpu_initialization=True,
            perform_initialization=False,
            # Activations are in pointwise.py, the other fusions there too, or they need apex.
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            persist_layer_norm=False,
        )


def _block(model: ModelConfig) -> dict[str, Any]:
    """Settings of the transformer block. Raises UserError for an odd number of rotary features."""
    rotary = model.rotary_features
    require(
        rotary % 2 == 0,
        f"model.rotary_fraction={model.rotary_fraction} of {model.head_dim} features per head gives {rotary} rotary "
        "features: it must be an even number.",
    )
    gated = model.activation == "swiglu"
    return {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.ffn,
        "normalization": "LayerNorm" if model.norm == "layernorm" else "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "add_bias_linear": model.bias,
        "gated_linear_unit": gated,
        # For megatron-core's own checks: the layers use pointwise.py's.
        "activation_func": F.silu if gated else F.gelu,
    }


def _split(parallel: ParallelConfig) -> dict[str, Any]:
    """Settings of the process grid."""
    chunks = parallel.virtual_pipeline
    interleaved = chunks is not None and chunks > 1
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "context_parallel_size": parallel.context,
        "virtual_pipeline_model_parallel_size": chunks if interleaved else None,
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers,
        # Of two stages each is the other's next and previous one: batched messages between them would be mixed up.
        "batch_p2p_comm": not interleaved,
        "overlap_p2p_comm": interleaved and parallel.overlap,
        "sequence_parallel": parallel.sequence,
    }


def check_model(config: Config) -> None:
    """Raise UserError for what megatron-core would refuse when the model is built."""
    try:
        transformer_config(config)
    except UserError:
        raise
    except (ValueError, AssertionError) as error:
        raise UserError(f"this combination of model and parallel settings cannot be built: {error}") from None


def build_model(
    config: Config,
    vocabulary: int,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    draw: bool = True,
) -> SepGPTModel:
    """Build one chunk of the model on the CPU; megatron-core's groups must exist.

    vocabulary: entries before padding. pre_process and post_process: whether this chunk holds the embedding and the
    output layer. vp_stage: number of the chunk under the interleaved schedule. draw: whether to give it its initial
    weights; without, the caller fills every parameter. The caller moves the model to its device. Raises UserError for
    an attention pattern that does not fit the model.
    """
    model = config.model
    settings = transformer_config(config)
    pointwise = Pointwise(model, config.training)
    spec = layer_spec(model, config.attention, resolve_pattern(config.attention, model.layers), pointwise)
    block = TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(settings, vp_stage),
        layer_norm=norm_class(model.norm, compiled=pointwise.compiled),
    )
    gpt = SepGPTModel(
        settings,
        model,
        block,
        vocab_size=padded_vocabulary(vocabulary, config.parallel.tensor),
        vocabulary=vocabulary,
        loss_chunk=config.training.loss_chunk,
        pointwise=pointwise,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
    )
    mark_split(gpt, gated=model.activation == "swiglu")
    if draw:
        initialize(gpt, model, config.seed)
    return gpt

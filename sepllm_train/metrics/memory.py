"""Bytes of device memory that a run is expected to need, before anything is allocated."""

from __future__ import annotations

from sepllm_train.config.schema import ModelConfig, ParallelConfig, TrainingConfig
from sepllm_train.metrics.flops import layer_parameters, norm_parameters


def memory_estimate(
    model: ModelConfig,
    padded_vocabulary: int,
    parallel: ParallelConfig,
    training: TrainingConfig,
    sequence_length: int,
) -> dict[str, int]:
    """Bytes on the rank that needs the most: `weights`, `gradients`, `optimizer`, `activations` and their `total`.

    Weights are kept in the training precision and gradients in fp32; the optimizer holds Adam's two moments in fp32
    and, for half precision, an fp32 copy of the weights, all of it on every data-parallel rank. Activations follow
    Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models" (section 4 and appendix
    B), adapted to this model: no dropout masks, no S x S tensors because attention is computed in blocks,
    recompute=selective repeating the MLP, gated MLPs and grouped keys counted by their own widths, rotated copies of
    queries and keys, one input for the two norms of a parallel-residual block. Temporary and communication buffers
    and the allocator's fragmentation come on top.
    """
    stages, tensor = parallel.pipeline, parallel.tensor
    element = 4 if training.precision == "fp32" else 2
    outside, saved, working = _layer_activations(model, parallel, training.recompute, element)
    layers = -(-model.layers // stages)
    # The final norm's input and output, the logits, and in half precision their fp32 copy, which becomes the softmax.
    head = 2 * outside + (4 if element == 4 else element + 4) * padded_vocabulary / tensor
    last = layers * saved + working + head
    # The first stage of the 1F1B schedule holds one micro-batch per stage, so the activations of as many layers as
    # the model has, and more when chunks are interleaved; the last stage holds one micro-batch.
    chunks = parallel.virtual_pipeline or 1
    first = model.layers * (1 + (stages - 1) / (stages * chunks) if chunks > 1 else 1) * saved + working

    sharded, whole = layer_parameters(model)
    body = layers * (sharded // tensor + whole)
    table = padded_vocabulary * model.hidden // tensor
    norm = norm_parameters(model)
    if stages == 1:
        candidates = [(body + table * (1 if model.tied_embeddings else 2) + norm, last)]
    else:
        candidates = [(body + table, first), (body + table + norm, last)]
    tokens = training.micro_batch * sequence_length
    estimates = [_bytes(parameters, round(activations * tokens), element) for parameters, activations in candidates]
    return max(estimates, key=lambda estimate: estimate["total"])


def _bytes(parameters: int, activations: int, element: int) -> dict[str, int]:
    """Bytes by purpose of a rank with so many parameters."""
    estimate = {
        "weights": element * parameters,
        "gradients": 4 * parameters,
        "optimizer": (8 if element == 4 else 12) * parameters,
        "activations": activations,
    }
    return estimate | {"total": sum(estimate.values())}


def _layer_activations(
    model: ModelConfig, parallel: ParallelConfig, recompute: str, element: int
) -> tuple[float, float, float]:
    """Bytes per token: of one hidden state, of what a layer keeps for its backward pass, of recomputing one layer."""
    tensor = parallel.tensor
    # Tensor parallelism splits what lies inside attention and MLP; the rest only with sequence parallelism.
    outside = element * model.hidden / (tensor if parallel.sequence else 1)
    query, key = model.heads * model.head_dim, model.query_groups * model.head_dim
    # What the projection returns stays whole because the values are a part of it; queries and keys are rotated into
    # copies; the attended values are the input of the next projection.
    attention = query + 2 * key + (query + key if model.rotary_fraction > 0 else 0) + query
    # Before and after the activation; a gate adds its half of the projection and keeps both factors as copies.
    mlp = model.ffn * (5 if model.activation == "swiglu" else 2)
    mlp_inside = element * mlp / tensor
    statistics = 4 * model.heads / tensor  # the softmax denominators of the queries
    # Inputs of the two norms, and of the two projections that read what the norms return.
    attention_inside = element * attention / tensor + statistics
    everything = outside * ((1 if model.parallel_residual else 2) + 2) + attention_inside + mlp_inside
    if recompute == "full":
        return outside, outside, everything
    if recompute == "selective":
        return outside, everything - mlp_inside, mlp_inside
    return outside, everything, 0.0

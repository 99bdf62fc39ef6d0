"""Bytes of device memory that a run is expected to need, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from sepllm_train.config.param_groups import muon_matrices
from sepllm_train.config.schema import Config
from sepllm_train.metrics.flops import layer_parameters, norm_parameters


@dataclass(frozen=True)
class _LayerBytes:
    """Bytes per token of one layer on one rank.

    `hidden` is a hidden state between layers, `gathered` the same one where sequence parallelism has put it together
    again. `norm` is what a norm keeps beside its input. `kept` waits for the backward pass, `repeated` comes back by
    recomputation, `passing` are the gradients that are there at once while a layer is differentiated.
    """

    hidden: float
    gathered: float
    norm: float
    kept: float
    repeated: float
    passing: float


def memory_estimate(
    config: Config, padded_vocabulary: int, *, replicas: int = 1, attended_share: float = 1.0, device: str = "cuda"
) -> dict[str, int]:
    """Bytes on the rank that needs the most: `weights`, `gradients`, `optimizer`, `activations` and their `total`.

    `replicas` is the data-parallel size, `device` the device's type, `attended_share` that of the causal triangle:
    with context parallelism the keys that are fetched from other ranks follow from it. Weights are kept in the training
    precision and gradients in fp32; the optimizer holds Adam's two moments, or Muon's one, in fp32 and, for half
    precision, an fp32 copy of the weights, on every replica or, with parallel.sharded_optimizer, divided among them.
    `activations` is the peak of what comes and goes within a step: the worse of the loss and the output layer's
    gradient, and the backward pass of a transformer layer; a fused Adam takes nothing on top, and Muon's few copies of
    one matrix are less. What layers keep follows Korthikanti et al. 2022, "Reducing Activation Recomputation in Large
    Transformer Models" (section 4 and appendix B), adapted to this model: no dropout masks, no S x S tensors because
    attention is computed in blocks, recompute=selective repeating the MLP, gated MLPs and grouped keys counted by
    their own widths, rotated copies of queries and keys, one input for the two norms of a parallel-residual block.

    On top come the attention backend's own buffers (`blocked`: a few MiB for each sequence of a micro-batch), the
    fragmentation of the allocator, and the buffers of CUDA, NCCL and gloo.
    """
    model, parallel = config.model, config.parallel
    sharded, whole = layer_parameters(model)
    table = padded_vocabulary * model.hidden // parallel.tensor
    norm = norm_parameters(model)
    layers = parallel.stage_layers(model.layers)
    ends = {0: table, parallel.pipeline - 1: table + norm}
    if parallel.pipeline == 1:
        ends = {0: table * (1 if model.tied_embeddings else 2) + norm}
    muon = sum(rows * columns for rows, columns in muon_matrices(config).values()) // parallel.tensor
    estimates = []
    # Of equal stages in the middle the first one holds the most micro-batches.
    for stage in sorted({0, min(1, parallel.pipeline - 1), parallel.pipeline - 1}):
        held = _held(config, layers[stage] * (sharded // parallel.tensor + whole) + ends.get(stage, 0), replicas)
        held["optimizer"] -= 4 * layers[stage] * muon
        activations = round(_activations(config, padded_vocabulary, replicas, attended_share, device, stage))
        estimates.append({**held, "activations": activations, "total": sum(held.values()) + activations})
    return max(estimates, key=lambda estimate: estimate["total"])


def _held(config: Config, parameters: int, replicas: int) -> dict[str, int]:
    """Bytes that a rank with so many parameters holds all the time."""
    element = _element(config)
    return {
        "weights": element * parameters,
        "gradients": 4 * parameters,
        "optimizer": (8 if element == 4 else 12) * parameters // _optimizer_shards(config, replicas),
    }


def _optimizer_shards(config: Config, replicas: int) -> int:
    """Ranks that share one copy of the optimizer's state: with a sharded optimizer all that hold the same weights."""
    return replicas * config.parallel.context if config.parallel.sharded_optimizer else 1


def _element(config: Config) -> int:
    """Bytes of a number in the training precision."""
    return 4 if config.training.precision == "fp32" else 2


def _activations(
    config: Config, padded_vocabulary: int, replicas: int, attended_share: float, device: str, stage: int
) -> float:
    """Peak bytes of the forward and backward passes of a pipeline stage, counted from 0."""
    model, parallel, training = config.model, config.parallel, config.training
    element, tensor, stages = _element(config), parallel.tensor, parallel.pipeline
    layer = _layer(config, attended_share, device)
    tokens = training.micro_batch * config.data.sequence_length / parallel.context
    flying = _micro_batches_in_flight(config, replicas, stage)
    # Between stages, a hidden state of each micro-batch waits for its gradient.
    layers = parallel.stage_layers(model.layers)[stage]
    kept = tokens * flying * (layers * layer.kept + (layer.hidden if stages > 1 else 0))
    # Sequence parallelism gathers its inputs in one buffer that stays.
    kept += tokens * layer.gathered if parallel.sequence else 0
    # The gradient of a weight is summed into the fp32 ones once it is there as a whole.
    weight = element * model.ffn * model.hidden * (2 if model.activation == "swiglu" else 1) / tensor
    backward = kept + tokens * (layer.repeated + layer.passing) + weight
    if stage < stages - 1:
        return backward
    # The final norm's input and output wait while the loss is computed.
    norm = tokens * (2 * layer.hidden + layer.norm)
    return max(backward, kept + norm + _loss(config, padded_vocabulary / tensor, tokens, layer))


def _loss(config: Config, rows: float, tokens: float, layer: _LayerBytes) -> float:
    """Peak bytes of output layer and loss, of which this rank has `rows` entries, on `tokens` tokens."""
    element, hidden, training = _element(config), config.model.hidden, config.training
    if not (training.loss_chunk or training.compile):
        # The logits, in half precision with their fp32 copy, which becomes the softmax and then their gradient; after
        # that the gradient in the training precision and that of the output layer.
        loss = tokens * rows * (4 if element == 4 else 6)
        return max(loss, element * rows * (tokens + hidden) + tokens * layer.gathered)
    # The backward pass of a chunk: its logits, beside what becomes their gradient and, where that is not one kernel,
    # an fp32 copy; after that the gradient and its product, which is added to the output layer's in fp32. Besides the
    # gradient of the hidden states, and these themselves where sequence parallelism has put them together.
    chunk = min(training.loss_chunk or tokens, tokens)
    logits = chunk * rows * (2 * element if training.compile else 8 if element == 4 else 10)
    product = rows * (0 if element == 4 else element * (chunk + hidden))
    states = tokens * layer.gathered * (2 if config.parallel.sequence else 1)
    return 4 * rows * hidden + max(logits, product) + states


def _micro_batches_in_flight(config: Config, replicas: int, stage: int) -> float:
    """Micro-batches whose activations a stage, counted from 0, holds at once.

    Of 1F1B's P stages number s holds P - s. Interleaving C chunks per stage it begins with the forward passes of
    2 (P - s - 1) + (C - 1) P chunks (Narayanan et al. 2021, section 2.2), and holds one more: for the first stage that
    is P + (P - 1) / C micro-batches (Korthikanti et al. 2022, section 4.2.3).
    """
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline or 1
    training = config.training
    flying = stages - stage if chunks == 1 else stages + (stages - 1 - 2 * stage) / chunks
    return min(flying, training.global_batch // (training.micro_batch * replicas))


def _layer(config: Config, attended_share: float, device: str) -> _LayerBytes:
    """Needs of one layer on `device`, in bytes per token of a rank's part of the sequence."""
    model, tensor, element = config.model, config.parallel.tensor, _element(config)
    compiled = config.training.compile
    gathered = float(element * model.hidden)
    # Tensor parallelism splits what lies inside attention and MLP; the rest only with sequence parallelism.
    hidden = gathered / (tensor if config.parallel.sequence else 1)
    query, key = model.heads * model.head_dim, model.query_groups * model.head_dim
    # What the projection returns stays whole because the values are a part of it; queries and keys are rotated into
    # copies; the attended values are the input of the next projection.
    attention: float = query + 2 * key + (query + key if model.rotary_fraction > 0 else 0) + query
    gated = model.activation == "swiglu"
    # Under context parallelism keys and values are put together with those fetched for the rank's two chunks: all
    # special keys before each, and the window's.
    parts = config.parallel.context
    attention += 2 * key * (1 + attended_share * (parts - 0.5)) if parts > 1 else 0
    # Before and after the activation; a gate adds its half of the projection and, unless compiled, its activation.
    mlp = element * model.ffn * (2 + gated * (1 if compiled else 2)) / tensor
    statistics = 4 * model.heads / tensor  # the softmax denominators of the queries
    # On a CPU torch computes RMSNorm from parts: the normalised values stay, and with half precision an fp32 input.
    in_parts = model.norm == "rmsnorm" and device == "cpu" and not compiled
    norm = hidden * (1 if element == 4 else 3) if in_parts else 0.0
    # Inputs of the two norms, and of the two projections that read what the norms return.
    norms = hidden * ((1 if model.parallel_residual else 2) + 2) + 2 * norm
    everything = norms + element * attention / tensor + statistics + mlp
    passing = gathered + element * model.ffn * (2 if gated else 1) / tensor
    kept, repeated = {
        "none": (everything, 0.0),
        "selective": (everything - mlp, mlp),
        "full": (hidden, everything),
    }[config.training.recompute]
    return _LayerBytes(hidden, gathered, norm, kept, repeated, passing)

"""Initial weights that depend on the seed and the tensor's place in the model, not on how the model is split."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor
from torch.nn import Parameter

from sepllm_train.config.schema import ModelConfig
from sepllm_train.model.gpt import SepGPTModel

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


def standard_deviations(model: ModelConfig) -> tuple[float, float]:
    """Standard deviation of the normal distribution of most weights, and of the two projections back to the residual.

    pythia: sqrt(2 / (5 hidden)) (Nguyen and Salazar 2019, "Transformers without Tears", small init) and
    2 / (layers sqrt(hidden)) (GPT-J's), as GPT-NeoX combines them. normal: `init_std`, and `init_output_std` or
    init_std / sqrt(2 layers) (GPT-2).
    """
    if model.init == "pythia":
        return math.sqrt(2 / (5 * model.hidden)), 2 / (model.layers * math.sqrt(model.hidden))
    return model.init_std, model.init_output_std or model.init_std / math.sqrt(2 * model.layers)


@torch.no_grad()
def initialize(model: SepGPTModel, config: ModelConfig, seed: int) -> None:
    """Fill the parameters of a model chunk in place, once `mark_split` has marked how they are split.

    Biases are zero; norms and sinks have their values already. Each whole matrix is drawn from a generator of its own,
    seeded by `seed` and the matrix's name with the layer counted over the whole model, and this rank takes its part:
    any tensor, pipeline or vocabulary padding layout starts from the same weights. Rows of padding are zero.
    """
    usual, projection = standard_deviations(config)
    for name, parameter in global_names(model):
        if parameter.dim() < 2:
            if name.endswith(".bias"):
                parameter.zero_()
            continue
        deviation = projection if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else usual
        shape = _whole_shape(parameter, model)
        if name in (EMBEDDING, OUTPUT):
            whole = torch.zeros(shape)
            whole[: model.vocabulary] = _draw([model.vocabulary, shape[1]], deviation, f"{seed}/{name}")
        else:
            whole = _draw(shape, deviation, f"{seed}/{name}")
        parameter.copy_(_shard(whole, parameter, model))


def mark_split(model: SepGPTModel, gated: bool) -> None:
    """Mark, for megatron-core too, along which dimension each matrix is split over the tensor-parallel ranks, and in
    how many parts.

    The gate and up projections share a matrix (linear_fc1) and are each split on their own.
    """
    for name, module in model.named_modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)) and module.weight is not None:
            stride = 2 if gated and name.endswith("linear_fc1") else 1
            _mark(module.weight, 0, stride)
        elif isinstance(module, RowParallelLinear):
            _mark(module.weight, 1, 1)


def _mark(weight: Parameter, dim: int, stride: int) -> None:
    """megatron-core 0.18 and newer mark weights themselves, with stride 1, and refuse a second mark."""
    weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    weight.partition_dim, weight.partition_stride = dim, stride  # type: ignore[attr-defined]


def global_names(model: SepGPTModel) -> Iterator[tuple[str, Parameter]]:
    """Parameters with the names that they have in an unsplit model."""
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
        # A tied output layer of another pipeline stage is a copy of the embedding.
        tied = name == OUTPUT and model.share_embeddings_and_output_weights
        yield EMBEDDING if tied else ".".join(parts), parameter


def _whole_shape(parameter: Parameter, model: SepGPTModel) -> list[int]:
    """Shape of the matrix of which `parameter` is this tensor-parallel rank's part."""
    shape = list(parameter.shape)
    shape[parameter.partition_dim] *= get_pg_size(model.tp_group)  # type: ignore[attr-defined]
    return shape


def _draw(shape: list[int], deviation: float, key: str) -> Tensor:
    """fp32 normal tensor that is a function of its arguments alone."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    generator = torch.Generator("cpu").manual_seed(number)
    return torch.empty(shape).normal_(0, deviation, generator=generator)


def _shard(whole: Tensor, parameter: Parameter, model: SepGPTModel) -> Tensor:
    """This tensor-parallel rank's part of a matrix."""
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    size, rank = get_pg_size(model.tp_group), get_pg_rank(model.tp_group)
    if size == 1:
        return whole
    return torch.cat(whole.chunk(size * stride, dim)[rank::size], dim)

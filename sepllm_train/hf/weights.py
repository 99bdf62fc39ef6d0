"""Names and layouts of weights: megatron-core's on one side, those of transformers' classes on the other.

Shape letters: L layers, G key-value heads, P query heads of each, D features of a head, E the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sepllm_train.config.schema import ModelConfig

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
VOCABULARY = (EMBEDDING, OUTPUT)
_LAYERS = "decoder.layers."
_QKV = "self_attention.linear_qkv.weight"
_GATE_UP = "mlp.linear_fc1.weight"


@dataclass(frozen=True)
class Family:
    """The tensors of a family by our names.

    `outside` of layers, and `inside` of one, there with all that ours is cut into. `layer`: what their names of a layer
    begin with. `ignored`: ends of the names of what their files may hold besides.
    """

    layer: str
    outside: dict[str, str]
    inside: dict[str, tuple[str, ...]]
    ignored: tuple[str, ...] = ()


# Each head's query, key and value lie side by side in GPT-NeoX as they do in megatron-core.
NEOX = Family(
    layer="gpt_neox.layers.{}.",
    outside={
        EMBEDDING: "gpt_neox.embed_in.weight",
        "decoder.final_layernorm.weight": "gpt_neox.final_layer_norm.weight",
        "decoder.final_layernorm.bias": "gpt_neox.final_layer_norm.bias",
        # The name in files; transformers' newer versions call the module lm_head.
        OUTPUT: "embed_out.weight",
    },
    inside={
        f"{ours}.{kind}": (f"{theirs}.{kind}",)
        for ours, theirs in {
            "input_layernorm": "input_layernorm",
            "self_attention.linear_qkv": "attention.query_key_value",
            "self_attention.linear_proj": "attention.dense",
            "pre_mlp_layernorm": "post_attention_layernorm",
            "mlp.linear_fc1": "mlp.dense_h_to_4h",
            "mlp.linear_fc2": "mlp.dense_4h_to_h",
        }.items()
        for kind in ("weight", "bias")
    },
    ignored=("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
)
LLAMA = Family(
    layer="model.layers.{}.",
    outside={
        EMBEDDING: "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        OUTPUT: "lm_head.weight",
    },
    inside={
        "input_layernorm.weight": ("input_layernorm.weight",),
        _QKV: ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
        "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
        _GATE_UP: ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
    },
    ignored=("rotary_emb.inv_freq",),
)
QWEN3 = Family(
    layer=LLAMA.layer,
    outside=LLAMA.outside,
    inside={
        **LLAMA.inside,
        "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
        "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
    },
    ignored=LLAMA.ignored,
)


def to_theirs(
    family: Family, model: ModelConfig, vocabulary: int, name: str, whole: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of theirs, each with memory of its own, from a tensor of a checkpoint of ours.

    whole: as checkpoints hold it, [L, ...] inside of layers. vocabulary: entries; rows of padding beyond them are left
    out. Raises KeyError for a name that the family does not have.
    """
    if not name.startswith(_LAYERS):
        yield family.outside[name], whole[:vocabulary].clone() if name in VOCABULARY else whole
        return
    inside = name.removeprefix(_LAYERS)
    for layer, tensor in enumerate(whole):
        for target, part in zip(family.inside[inside], _cut(family, model, inside, tensor), strict=True):
            yield family.layer.format(layer) + target, part.clone()


def to_ours(family: Family, model: ModelConfig, name: str, read: Callable[[str], Tensor]) -> Tensor:
    """The tensor of our parameter `name` (decoder.layers.3.mlp.linear_fc1.weight), from those that `read` gives by
    their names; without padding of the vocabulary. Raises KeyError for a name that the family does not have."""
    if not name.startswith(_LAYERS):
        return read(family.outside[name])
    number, inside = name.removeprefix(_LAYERS).split(".", 1)
    parts = [read(family.layer.format(number) + source) for source in family.inside[inside]]
    if len(parts) == 1:
        return parts[0]
    if inside == _GATE_UP:
        return torch.cat(parts)
    q, k, v = (part.unflatten(0, (model.query_groups, -1, model.head_dim)) for part in parts)
    return torch.cat((q, k, v), 1).flatten(0, 2)


def their_names(family: Family, model: ModelConfig) -> set[str]:
    """Every tensor that a model of theirs needs in its files."""
    outside = {theirs for ours, theirs in family.outside.items() if not (ours == OUTPUT and model.tied_embeddings)}
    inside = {name for parts in family.inside.values() for name in parts}
    return outside | {family.layer.format(layer) + name for layer in range(model.layers) for name in inside}


def _cut(family: Family, model: ModelConfig, inside: str, tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor of one layer of ours as the parts that theirs has."""
    if len(family.inside[inside]) == 1:
        return (tensor,)
    if inside == _GATE_UP:
        return tensor.chunk(2)
    # [G, P + 2, D, E]: a key-value head's queries, then its key and its value.
    groups = tensor.unflatten(0, (model.query_groups, -1, model.head_dim))
    return groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)

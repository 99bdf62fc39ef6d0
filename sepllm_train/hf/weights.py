"""Names and layouts of weights: megatron-core's on one side, those of transformers' classes on the other.

Shape letters: L layers, G key-value heads, P query heads of each, D features of a head, E the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sepllm_train.base.errors import UserError, first_line
from sepllm_train.base.parsing import read_json
from sepllm_train.config.schema import ModelConfig
from sepllm_train.runs.open import refuse_not_finite

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
VOCABULARY = (EMBEDDING, OUTPUT)
_LAYERS = "decoder.layers."
_QKV = "self_attention.linear_qkv.weight"
_GATE_UP = "mlp.linear_fc1.weight"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


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


@contextmanager
def writing_safetensors() -> Iterator[None]:
    """Raise what safetensors reports of a full disk in the block as the OSError that it was."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(first_line(error)) from error


class SafetensorsFolder:
    """The tensors of a transformers model by name, read one at a time.

    Raises UserError when there are none in safetensors' format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = self._find()

    @property
    def names(self) -> set[str]:
        """Names of the tensors."""
        return set(self._files)

    def read(self, name: str) -> Tensor:
        """A tensor. Raises UserError when it is not there, is not finite or its file cannot be read."""
        if name not in self._files:
            raise UserError(f"{self.folder} has no tensor {name}: it is not the model of its config.json.")
        with self._open(self._files[name]) as file:
            tensor = file.get_tensor(name)
        refuse_not_finite(self.folder / self._files[name], [(name, tensor)])
        return tensor

    def types(self, names: Iterable[str]) -> set[str]:
        """safetensors' names of the types of these tensors, such as F32. Raises UserError as `read` does."""
        by_file: dict[str, list[str]] = {}
        for name in sorted(names):
            by_file.setdefault(self._files[name], []).append(name)
        found = set()
        for file_name, mine in by_file.items():
            with self._open(file_name) as file:
                found |= {file.get_slice(name).get_dtype() for name in mine}
        return found

    @contextmanager
    def _open(self, file_name: str) -> Iterator[Any]:
        """A file to read tensors of in the block. Raises UserError where that fails."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / file_name
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({first_line(error)}): copy it again.") from None

    def _find(self) -> dict[str, str]:
        """The file of each tensor."""
        from safetensors import SafetensorError, safe_open

        index, single = self.folder / _INDEX, self.folder / _SINGLE
        try:
            if index.is_file():
                files = dict(read_json(index, "copy the model again")["weight_map"])
                if all(Path(file).name == file for file in files.values()):
                    return files
                raise ValueError("it names files outside of the folder")
            if single.is_file():
                with safe_open(single, framework="pt") as file:
                    return dict.fromkeys(file.keys(), _SINGLE)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"the weights in {self.folder} cannot be read ({first_line(error)}).") from None
        if any(self.folder.glob("*.bin")):
            raise UserError(
                f"{self.folder} has its weights as pickles (.bin), which can run code when they are read: convert them "
                "to safetensors with transformers' save_pretrained."
            )
        raise UserError(f"{self.folder} has no {_SINGLE}: give the folder of a transformers model.")

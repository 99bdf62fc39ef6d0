"""Random models of transformers that the tests of import and export share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

# More than the sample's tokenizer has, and no multiple of 128: our side pads it.
VOCABULARY = 4100
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
}
NEOX_ROPE = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
LLAMA_BLOCK = {
    "kv_heads": 2,
    "parallel_residual": False,
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "rotary_fraction": 1.0,
    "init": "normal",
}
# By name: type of transformers' model, its settings, attention that the import asks for.
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "neox": ("gpt_neox", {"rope_parameters": NEOX_ROPE}, ["pattern=sep", "window=8", "full_layers=first_last"]),
    "neox, sequential, tied": (
        "gpt_neox",
        {"use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
        ["pattern=sep", "window=[4,8,16]", "separate_documents=true"],
    ),
    "neox, yarn": (
        "gpt_neox",
        {"rope_parameters": NEOX_ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}},
        ["pattern=sep", "window=8"],
    ),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}, ["pattern=sep", "window=8"]),
    "llama, grouped, tied": (
        "llama",
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        ["pattern=sep", "window=8", "separators=[{classes: [period, newline], horizon: 24}]"],
    ),
    "llama": ("llama", {}, ["pattern=streaming", "window=16"]),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}, ["pattern=fixed", "interval=9"]),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}, []),
}


def make_model(folder: Path, name: str, tokenizer: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Write a random model of transformers with a tokenizer; gives its tensors."""
    kind, settings, _ = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **(SMALL | settings))
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.dim() == 1 else 0.0)
    model.to(dtype).save_pretrained(folder)
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return load_file(folder / "model.safetensors")

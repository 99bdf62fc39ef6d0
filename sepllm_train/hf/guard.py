"""The guard of models that were trained with a pattern: transformers alone does not load them to attend fully.

Their config.json names an attention that only this package registers, and a class in the file beside it, which attends
by the pattern where a program allows remote code. transformers forgets the first when it saves a model and does not
write the second, so where this package is imported, configurations with a pattern are written and read with both.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from sepllm_train.base.files import write_whole
from sepllm_train.hf.separators import CONFIG_KEY

# Name of our attention among transformers' attention implementations.
ATTENTION = "sepllm"
# The file that makes an exported model work without this package.
MODULE = Path(__file__).with_name("modeling_sepllm.py")
# Key of config.json under which transformers reads the name of a model's attention.
_IMPLEMENTATION = "attn_implementation"
# Classes of MODULE, by those of transformers. A program that goes by the name of a class, as vLLM does, does not know
# ours, and does not load the model to attend fully.
STANDALONE = {
    "gpt_neox": ("GPTNeoXForCausalLM", "SepGPTNeoXForCausalLM"),
    "llama": ("LlamaForCausalLM", "SepLlamaForCausalLM"),
    "qwen3": ("Qwen3ForCausalLM", "SepQwen3ForCausalLM"),
}


def _guarded(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json with the guard where it has a pattern, and without it where it has none any more."""
    if content.get(CONFIG_KEY) is None:
        stale = MODULE.stem in str(content.get("auto_map"))
        return {key: value for key, value in content.items() if not (stale and key == "auto_map")}
    guarded = {**content, _IMPLEMENTATION: ATTENTION}
    if content.get("model_type") in STANDALONE:
        stock, ours = STANDALONE[content["model_type"]]
        guarded["auto_map"] = {"AutoModelForCausalLM": f"{MODULE.stem}.{ours}"}
        guarded["architectures"] = [ours if name == stock else name for name in content.get("architectures") or ()]
    return guarded


def _writing(to_dict: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`to_dict` of a configuration, which every way of saving one calls, with the guard."""

    @functools.wraps(to_dict)
    def guarded(config: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return _guarded(to_dict(config, *args, **kwargs))

    return guarded


def _saving(save: Callable[..., Any]) -> Callable[..., Any]:
    """`save_pretrained` of a configuration, with the file that its `auto_map` names."""

    @functools.wraps(save)
    def guarded(config: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(config, CONFIG_KEY, None) is not None and not os.path.isfile(save_directory):
            os.makedirs(save_directory, exist_ok=True)
            write_whole(Path(save_directory) / MODULE.name, MODULE.read_bytes())
        return save(config, save_directory, *args, **kwargs)

    return guarded


def _reading(from_dict: Callable[..., Any]) -> Callable[..., Any]:
    """`from_dict` of configurations, which every way of loading one calls, with the guard where it was lost."""

    @functools.wraps(from_dict)
    def guarded(cls: type, content: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if content.get(CONFIG_KEY) is not None and content.get(_IMPLEMENTATION) is None:
            content = {**content, _IMPLEMENTATION: ATTENTION}
        return from_dict(cls, content, *args, **kwargs)

    return guarded


PreTrainedConfig.to_dict = _writing(PreTrainedConfig.to_dict)
PreTrainedConfig.save_pretrained = _saving(PreTrainedConfig.save_pretrained)
PreTrainedConfig.from_dict = classmethod(_reading(PreTrainedConfig.from_dict.__func__))

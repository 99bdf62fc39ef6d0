"""The guard of models that were trained with a pattern: transformers alone does not load them to attend fully.

Their config.json names an attention that only this package registers. transformers forgets that name when it saves a
model, so where this package is imported, configurations with a pattern are written and read with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from sepllm_train.hf.separators import CONFIG_KEY

# Name of our attention among transformers' attention implementations.
ATTENTION = "sepllm"
# Key of config.json under which transformers reads the name of a model's attention.
_IMPLEMENTATION = "attn_implementation"


def _writing(to_dict: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`to_dict` of a configuration, which every way of saving one calls, with the guard."""

    @functools.wraps(to_dict)
    def guarded(config: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        content = to_dict(config, *args, **kwargs)
        return content if content.get(CONFIG_KEY) is None else {**content, _IMPLEMENTATION: ATTENTION}

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
PreTrainedConfig.from_dict = classmethod(_reading(PreTrainedConfig.from_dict.__func__))

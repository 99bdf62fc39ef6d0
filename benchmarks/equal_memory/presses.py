"""Loss and needles of a dense model whose prompts are compressed by KVPress, SepLLM's press among them.

    make kvpress-env
    .venv-kvpress/bin/python benchmarks/equal_memory/presses.py models/books_dense --text pg19_test.jsonl.bz2 --unwrap \
        --prompt 1024 --keys 128,256 --output memory/presses

Runs in an environment of its own; benchmarks/equal_memory/caches.py measures this project's caches in the main one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sepllm_train.base.errors import UserError, exit_on_user_error, first_line
from sepllm_train.base.parsing import read_json

MEMORIES = ("full", "h2o", "snapkv", "pyramidkv", "streamingllm", "tova", "knorm", "random", "sepllm")
# Model types of transformers that KVPress knows.
_TYPES = ("llama", "mistral", "phi3", "qwen2", "qwen3")


def main() -> None:
    """Run the program. Raises UserError."""
    _require("torch")
    from data_prep.tokenizers import load_tokenizer
    from sepllm_train.evaluation.equal_memory import add_options, check_options, measure, tokenizer_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, MEMORIES)
    options = parser.parse_args()
    _require("kvpress")
    check_options(options, MEMORIES)
    model = _open(options.model)
    tokenizer = load_tokenizer(tokenizer_file(options.model))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{options.model}: the tokenizer has {tokenizer.vocab_size} entries, the model {model.config.vocab_size}."
        )
    measure(_memories(model, tokenizer, options), tokenizer, options)


def _require(package: str) -> None:
    """Raise UserError where a package is not installed."""
    if find_spec(package) is None:
        raise UserError(
            f"{package} is not installed for {sys.executable}: type `make kvpress-env`, then use "
            ".venv-kvpress/bin/python in place of it."
        )


def _open(folder: Path) -> Any:
    """A dense model. Raises UserError for others, and for those that KVPress or transformers cannot handle."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = read_json(folder / "config.json", "give a folder that `sepllm export` wrote")
    if config.get("model_type") not in _TYPES:
        raise UserError(
            f"{folder} is a {config.get('model_type')} model: KVPress knows {', '.join(_TYPES)}, so train one with "
            "model=llama."
        )
    if config.get("sepllm_attention") is not None:
        raise UserError(
            f"{folder} was trained with separator attention, and a press reads prompts with full attention: give the "
            "dense model, and measure this one with `python -m benchmarks.equal_memory.caches`."
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"the model in {folder} cannot be loaded ({first_line(error)}): export it again.") from None
    return model.eval()


def _memories(model: Any, tokenizer: Any, options: argparse.Namespace) -> Iterator[Any]:
    """The methods that the options name, one for each number of keys."""
    from kvpress import (
        KnormPress,
        ObservedAttentionPress,
        PyramidKVPress,
        RandomPress,
        SnapKVPress,
        StreamingLLMPress,
        TOVAPress,
    )

    # Beside this file: the package `benchmarks` wants the main environment.
    from sepllm_press import SepLLMPress
    from transformers import DynamicCache

    from data_prep.separators import class_numbers, classify
    from sepllm_train.evaluation.equal_memory import PromptMemory, local_window

    wanted = set(class_numbers(options.classes))
    separators = [number for number, kind in enumerate(classify(tokenizer.token_bytes()).tolist()) if kind in wanted]
    if not separators:
        raise UserError(f"{options.model}: the tokenizer has no separators among --classes {options.classes}.")

    def sepllm(keys: int) -> Any:
        return SepLLMPress(separator_ids=separators, initial=options.initial, window=local_window(options, keys))

    # Windows in which attention is observed must leave room among the keys. PyramidKV needs beta = 20 times its own, or
    # it gives all layers the same; 8 is its authors' number.
    presses: dict[str, Callable[[int], Any]] = {
        "h2o": lambda keys: ObservedAttentionPress(),
        "snapkv": lambda keys: SnapKVPress(window_size=min(64, keys // 2)),
        "pyramidkv": lambda keys: PyramidKVPress(window_size=max(1, min(8, keys // 20))),
        "streamingllm": lambda keys: StreamingLLMPress(n_sink=options.initial),
        "tova": lambda keys: TOVAPress(),
        "knorm": lambda keys: KnormPress(),
        "random": lambda keys: RandomPress(seed=0),
        "sepllm": sepllm,
    }
    common = {"source": "kvpress", "model": model, "new_cache": DynamicCache, "count": _kept}
    for name in options.memories:
        if name == "full":
            yield PromptMemory(name=name, budget=None, settings={}, **common)
            continue
        for keys in options.keys:
            press = presses[name](keys)
            settings = {key: value for key, value in asdict(press).items() if key != "compression_ratio"}
            if "separator_ids" in settings:
                settings |= {"separator_ids": len(separators), "classes": options.classes}
            reading = partial(_compressing, model, press, keys, "eager" if name == "h2o" else "sdpa")
            yield PromptMemory(name=name, budget=keys, settings=settings, reading=reading, **common)


def _kept(cache: Any) -> float:
    """Keys per layer and head: PyramidKV's differ by layer."""
    return sum(layer.keys.shape[2] for layer in cache.layers) / len(cache.layers)


def _compressing(model: Any, press: Any, keys: int, attention: str, length: int) -> AbstractContextManager[Any]:
    """`press` on a prompt of `length` tokens, of which `keys` stay; shorter ones stay whole."""
    if length <= keys:
        return nullcontext()
    # KVPress keeps int(length * (1 - ratio)) keys: half a key more, so that rounding cannot take one away.
    press.compression_ratio = 1 - (keys + 0.5) / length
    return _attending(model, press, attention)


@contextmanager
def _attending(model: Any, press: Any, attention: str) -> Iterator[None]:
    """`press` on a model whose attention is of the kind that the press needs."""
    model.set_attn_implementation(attention)
    try:
        with press(model):
            yield
    finally:
        model.set_attn_implementation("sdpa")


if __name__ == "__main__":
    exit_on_user_error(main)

"""The model of a stream and its cache, from what is typed on the command line."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.tokenizers import Tokenizer, load_tokenizer
from sepllm_train.base.errors import UserError, first_line
from sepllm_train.runs.open import open_run

CACHES = ("sep", "streaming", "fixed", "pattern", "full")
POSITIONS = ("cache", "training", "absolute")
# What a configuration says of the computation that the weights' shapes do not.
_FACTS = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "rope_parameters",
    "sliding_window",
    "sepllm_attention",
)


@dataclass(frozen=True)
class CacheOptions:
    """A cache by name and its sizes in tokens; None takes what suits the cache."""

    cache: str = "sep"
    initial: int = 4
    separators: int = 64
    window: int = 224
    capacity: int | None = None
    interval: int | None = None
    positions: str | None = None
    classes: str = "paper"
    strict: bool = False
    block: int = 1024

    def describe(self) -> dict[str, Any]:
        """The options that say something about this cache, for results."""
        used = {
            "sep": ("initial", "separators", "window", "capacity", "positions", "classes"),
            "streaming": ("initial", "window", "capacity", "positions"),
            "fixed": ("initial", "separators", "window", "capacity", "interval", "positions"),
        }.get(self.cache, ())
        return {"cache": self.cache, **{key: value for key, value in asdict(self).items() if key in used}}


@dataclass(frozen=True)
class Opened:
    """A model of transformers with its tokenizer; `name` is what it was opened from."""

    model: Any
    tokenizer: Tokenizer
    name: str

    def fingerprint(self) -> str:
        """Hash over what makes the model: the shape and beginning of every tensor, and what the configuration adds.

        It tells one model from another in a moment, and is the same in every version of transformers.
        """
        whole = self.model.config
        facts = {key: getattr(whole.get_text_config(), key, getattr(whole, key, None)) for key in _FACTS}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten()[:256].cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def open_model(folder: str, tokenizer: str | None, dtype: str, device: str) -> Opened:
    """A run of ours, or a folder of a transformers model with its weights in safetensors.

    tokenizer: file to take in place of the model's own. Raises UserError when there is none of these, when it cannot be
    loaded, and when the tokenizer is another model's.
    """
    path = Path(folder)
    kind = getattr(torch, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype])
    if (path / "config.yaml").is_file():
        from sepllm_train.hf.export import in_memory

        run = open_run(path, tokenizer=tokenizer)
        model, found = in_memory(run, kind), run.tokenizer
    elif (path / "config.json").is_file():
        model = _load(path, kind)
        found = load_tokenizer(tokenizer or _tokenizer_file(path))
    else:
        raise UserError(f"{folder} is neither a run (config.yaml) nor a transformers model (config.json).")
    if found.vocab_size > model.config.get_text_config().vocab_size:
        raise UserError(
            f"the tokenizer {found.path} has {found.vocab_size} entries, the model's vocabulary "
            f"{model.config.get_text_config().vocab_size}: give the model's own with --tokenizer."
        )
    try:
        model = model.to(device)
    except RuntimeError as error:
        raise UserError(f"{folder} cannot be put on --device {device}: {first_line(error)}.") from None
    return Opened(model.eval(), found, folder)


def _load(folder: Path, dtype: torch.dtype) -> Any:
    """A transformers model. Raises UserError when its folder is not whole or not understood."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from sepllm_train.hf import load_model

    try:
        # A cache decides what is seen; whatever has none attends fully.
        return load_model(str(folder), dense=True, dtype=dtype)
    except UserError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        cause = first_line(error).rstrip(":")
        raise UserError(
            f"the model in {folder} cannot be loaded ({cause}): give a whole folder with config.json and weights in "
            "safetensors."
        ) from None


def make_cache(opened: Opened, options: CacheOptions) -> Any:
    """The cache. Raises UserError for options that do not fit together or do not suit the model."""
    from sepllm_train import hf

    model = opened.model
    common: dict[str, Any] = {"strict": options.strict, "block": options.block}
    moving: dict[str, Any] = {**common, "positions": options.positions}
    trained = hf.trained_pattern(model.config)
    # An exported model's own separators, unless others are asked for.
    own = trained is not None and trained.separators and options.classes == "paper"
    separators: dict[str, Any] = {} if own else {"tokenizer": opened.tokenizer, "selection": options.classes}
    initial, count, window, capacity = options.initial, options.separators, options.window, options.capacity
    try:
        if options.cache == "sep":
            return hf.SepCache(model, initial, count, window, _needed(capacity, "sep"), **separators, **moving)
        if options.cache == "streaming":
            return hf.StreamingCache(model, initial, window, capacity, **moving)
        if options.cache == "fixed":
            if options.interval is None:
                raise UserError("--cache fixed needs --interval D: every D-th token stands for a separator.")
            size = _needed(capacity, "fixed")
            return hf.FixedCache(model, initial, count, window, size, interval=options.interval, **moving)
        if options.cache == "pattern":
            return hf.PatternCache(model, **common)
        return hf.FullCache(model, positions=options.positions or "training", **common)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None


def check_context(cache: Any, name: str, tokens: float, shorter: str) -> None:
    """Raise UserError when `tokens` tokens pass the model's context in a cache, named `name`, that is bound to it.

    shorter: what to do about the text, with {context} in it.
    """
    context = cache.context
    if cache.positions != "training" or context is None or tokens <= context:
        return
    if name == "pattern":
        other = "--cache sep"
    else:
        # Keys cannot move where a layer keeps all of them.
        other = "--positions cache" if name != "full" and len(cache.policies) == 1 else "--positions absolute"
    text = f"{tokens:,} tokens pass" if math.isfinite(tokens) else "a text without end passes"
    advice = shorter.format(context=context)
    raise UserError(f"{text} the model's context of {context:,}, which --cache {name} has here: {advice}, or {other}.")


def _needed(capacity: int | None, cache: str) -> int:
    if capacity is None:
        raise UserError(f"--cache {cache} needs --capacity, the keys it holds at most: above initial, separators and "
                        "window together.")  # fmt: skip
    return capacity


def _tokenizer_file(folder: Path) -> Path:
    found = [*folder.glob("tokenizer.json"), *folder.glob("*.model")]
    if not found:
        raise UserError(f"{folder} has neither tokenizer.json nor a SentencePiece .model: give one with --tokenizer.")
    return found[0]

"""The model of a stream and its cache, from what is typed on the command line."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.tokenizers import Tokenizer, load_tokenizer
from sepllm_train.base.errors import UserError, first_line
from sepllm_train.generation.choice import CLASSES, AttentionChoice
from sepllm_train.runs.open import open_run, refuse_not_finite

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
        raise UserError(
            f"{folder} is neither a run (config.yaml) nor a transformers model (config.json): give runs/NAME, or "
            "a folder that `sepllm export` wrote."
        )
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
    """A transformers model. Raises UserError when its folder is not whole or not understood, or a weight is NaN."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers.utils import logging

    from sepllm_train.hf import load_model

    logging.disable_progress_bar()
    try:
        # A cache decides what is seen; whatever has none attends fully.
        model = load_model(str(folder), dense=True, dtype=dtype)
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
    refuse_not_finite(folder, model.named_parameters())
    return model


def make_cache(opened: Opened, choice: AttentionChoice, *, strict: bool = False, block: int = 1024) -> Any:
    """The cache of a choice that is settled by `settled_for`.

    Raises UserError for numbers that do not fit together or do not suit the model.
    """
    from sepllm_train import hf

    model = opened.model
    common: dict[str, Any] = {"strict": strict, "block": block}
    moving: dict[str, Any] = {**common, "positions": choice.positions}
    trained = hf.trained_pattern(model.config)
    # An exported model's own separators, unless others are asked for.
    own = trained is not None and trained.separators and choice.classes is None
    separators: dict[str, Any] = {} if own else {"tokenizer": opened.tokenizer, "selection": choice.classes or CLASSES}
    chosen = settled_for(opened, choice)
    ends: dict[str, Any] = {"initial": chosen.initial, "window": chosen.window, "capacity": chosen.capacity}
    sizes = {**ends, "separators": chosen.separators}
    try:
        if choice.name == "sep":
            return hf.SepCache(model, **sizes, **separators, **moving)
        if choice.name == "streaming":
            return hf.StreamingCache(model, **ends, **moving)
        if choice.name == "fixed":
            assert choice.interval is not None
            return hf.FixedCache(model, interval=choice.interval, **sizes, **moving)
        if choice.name == "pattern":
            return hf.PatternCache(model, **common)
        return hf.FullCache(model, positions=choice.positions or "training", **common)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None


def settled_for(opened: Opened, choice: AttentionChoice) -> AttentionChoice:
    """The choice with the defaults for a model. Raises UserError for numbers that are too small or missing."""
    from sepllm_train.hf import trained_pattern

    choice.check()
    return choice.settled(trained_pattern(opened.model.config))


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


def _tokenizer_file(folder: Path) -> Path:
    found = [*folder.glob("tokenizer.json"), *folder.glob("*.model")]
    if not found:
        raise UserError(f"{folder} has neither tokenizer.json nor a SentencePiece .model: give one with --tokenizer.")
    return found[0]

"""Separators among the tokens of a transformers model, and the pattern it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sep_attention import FOREVER

from data_prep.tokenizers import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from sepllm_train.generation import pattern as token_patterns
from sepllm_train.generation.choice import CLASSES, INITIAL, WINDOW
from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.runs.vocabulary import TOKENIZER_NAMES

# Key of config.json under which an exported model carries its pattern.
CONFIG_KEY = "sepllm_attention"
BOS = "bos"


def trained_pattern(config: Any) -> TokenPattern | None:
    """The pattern that an exported model was trained with; None for a model that attends fully.

    Raises ValueError when it is there and cannot be read.
    """
    content = getattr(config, CONFIG_KEY, None)
    if content is None:
        return None
    pattern = TokenPattern.from_dict(content)
    # Tokens that were added to the model since are no separators.
    added = max(0, config.get_text_config().vocab_size - len(pattern.tier_of_token))
    return replace(pattern, tier_of_token=torch.nn.functional.pad(pattern.tier_of_token, (0, added)))


def make_pattern(
    model: Any,
    *,
    window: int = WINDOW,
    initial: int = INITIAL,
    separators: Sequence[int] | None = None,
    tokenizer: Any = None,
    selection: str = CLASSES,
) -> TokenPattern:
    """The paper's pattern for any model: which tokens are separators, `initial` first ones, `window` neighbours. The
    numbers are those of its training-free experiments.

    Separators are those given by id, or those of `tokenizer` (a transformers tokenizer, one of ours, or the path of its
    file) among the classes `selection`, or those an exported model was trained with. `bos` among the classes is the
    token of the model's config that begins a text, which SepLLM's release takes as a separator of Llama 3.

    Raises ValueError when there are none, or they do not fit the model's vocabulary.
    """
    config = model.config.get_text_config() if hasattr(model, "config") else model.get_text_config()
    vocabulary, layers = config.vocab_size, config.num_hidden_layers
    if separators is None and tokenizer is not None:
        names = [name.strip() for name in selection.split(",")]
        classes = ",".join(name for name in names if name != BOS)
        separators = separator_ids(tokenizer, classes, vocabulary=vocabulary) if classes else []
        if BOS in names:
            separators = [*separators, _beginning(config)]
    trained = trained_pattern(config)
    if separators is not None:
        if not len(separators):
            raise ValueError("separators=[] names no token: use StreamingCache for a cache without separators.")
        return TokenPattern.from_separators(separators, vocabulary, layers, window=window, initial=initial)
    if trained is None or not trained.separators:
        raise ValueError(
            f"which tokens are separators is not known: {type(model).__name__} does not carry a pattern. Give "
            "tokenizer= the model's tokenizer, or separator_ids= their ids."
        )
    return TokenPattern(
        (window,) * layers,
        initial,
        trained.horizons,
        trained.tier_of_token,
        end_of_document=trained.end_of_document,
    )


def _beginning(config: Any) -> int:
    """The token that begins a text. Raises ValueError where the config names none."""
    token = config.bos_token_id
    if not isinstance(token, int):
        raise ValueError(f"the class {BOS} needs a bos_token_id in the model's config, which has {token}.")
    return token


def separator_ids(tokenizer: Any, classes: str = CLASSES, *, vocabulary: int | None = None) -> list[int]:
    """Ids of a tokenizer's separators, ascending, found from the strings of its entries.

    tokenizer: of transformers, one of ours, the path of its file, or the folder of a model. classes: `paper` (the nine
    of arXiv 2412.12094), `all`, or names of data_prep.separators.CLASSES joined by commas. vocabulary: entries of the
    model, None where they need not be compared.

    Raises ValueError when there are none, for names that are no classes, and as `read_tokenizer` does.
    """
    return token_patterns.separator_ids(read_tokenizer(tokenizer, vocabulary), classes)


def no_separators(model: Any, *, window: int, initial: int, interval: int | None = None) -> TokenPattern:
    """StreamingLLM's pattern, or with `interval` every interval-th token in the place of separators."""
    config = model.config.get_text_config() if hasattr(model, "config") else model.get_text_config()
    nothing = torch.zeros(config.vocab_size, dtype=torch.uint8)
    return TokenPattern((window,) * config.num_hidden_layers, initial, (FOREVER,), nothing, interval)


def read_tokenizer(tokenizer: Any, vocabulary: int | None = None) -> Tokenizer:
    """One of our tokenizers from a transformers tokenizer, a file, a model's folder, or itself.

    Raises ValueError when its strings are not known or it has more entries than the model's `vocabulary`.
    """
    if isinstance(tokenizer, str | Path):
        # SentencePiece's file first: a tokenizer.json beside it was made from it.
        files = (Path(tokenizer) / name for name in sorted(TOKENIZER_NAMES.values(), reverse=True))
        tokenizer = load_tokenizer(next((file for file in files if file.is_file()), tokenizer))
    elif not isinstance(tokenizer, Tokenizer):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"{type(tokenizer).__name__} does not tell the strings of its entries: give the path of its "
                "tokenizer.json or SentencePiece model."
            )
        path = Path(tokenizer.name_or_path or "tokenizer")
        tokenizer = HuggingFaceTokenizer(path, backend.to_str().encode(), ends_documents=False)
    if vocabulary is not None and tokenizer.vocab_size > vocabulary:
        raise ValueError(
            f"{tokenizer.path} has {tokenizer.vocab_size} entries and the model's vocabulary {vocabulary}: it is "
            "another model's tokenizer."
        )
    return tokenizer

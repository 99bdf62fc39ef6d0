"""What is read of a run to use it: configuration, checkpoint, tokenizer, and the separator class of every token."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sample import prepare_sample
from data_prep.separators import classify
from data_prep.sidecar import HEADER_SUFFIX, with_suffix
from data_prep.tokenizers import Tokenizer, load_tokenizer
from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import Config, DataConfig, require
from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.model.pattern import resolve_pattern
from sepllm_train.runs.folder import find_checkpoint, read_config
from sepllm_train.training.checkpoint import read_state

# A tokenizer in the folder of a run or a model, by its kind.
TOKENIZER_NAMES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}


@dataclass(frozen=True, eq=False)
class Source:
    """A run that is used. `state` is the content of the checkpoint's state.json, `classes` u8 [vocabulary] the
    separator class of each entry, `pattern` that of training, also where it is `dense`."""

    folder: Path
    config: Config
    checkpoint: Path
    state: dict[str, Any]
    tokenizer: Tokenizer
    classes: np.ndarray
    pattern: TokenPattern

    @property
    def vocabulary(self) -> int:
        """Entries of the model's vocabulary, without padding."""
        return self.state["identity"]["model.vocabulary"]


def open_source(folder: Path | str, step: int | None = None, tokenizer: Path | str | None = None) -> Source:
    """Open a run. step: number of the checkpoint, None for the newest whole one. tokenizer: its file, None to look for
    it in the run's folder and beside its data; the tokens of the data are not needed.

    Without the data's side-car (an older one may count two classes as one) the classes are found from the tokenizer.
    Raises UserError when there is no run, whole checkpoint or tokenizer, the tokenizer is not the run's, or the pattern
    is not one of single tokens.
    """
    folder = Path(folder)
    config = read_config(folder)
    checkpoint = find_checkpoint(folder, step)
    state = read_state(checkpoint)
    placement = config.attention.placement
    require(
        placement == "natural",
        f"attention.placement={placement} of {folder} is for training alone: which tokens are separators depends on "
        "their place in the training data, not on the tokens.",
    )
    trained = state["identity"]["data (hash of the tokenizer)"]
    path = tokenizer or find_tokenizer(folder)
    require(
        path is not None or bool(trained),
        f"{folder} was imported from a model without a tokenizer: give its file with --tokenizer.",
    )
    # The sample corpus, which would be made now, has nothing to tell that the tokenizer does not.
    headers = [] if path is not None and config.data.source == "sample" else _headers(config.data)
    found = load_tokenizer(path or _beside(headers, folder, config.data))
    require(
        # A model that was imported without a tokenizer has none on record.
        trained in ("", found.sha256),
        f"{found.path} is not the tokenizer that {folder} was trained with: give its file with --tokenizer.",
    )
    classes = _classes(headers, found, state["identity"]["model.vocabulary"])
    pattern = resolve_pattern(config.attention, config.model.layers)
    own = TokenPattern.of_run(pattern, classes, found.eod)
    return Source(folder, config, checkpoint, state, found, classes, own)


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer file in a folder of a run or a model, or None."""
    return next((folder / name for name in TOKENIZER_NAMES.values() if (folder / name).is_file()), None)


def pad_classes(classes: np.ndarray, vocabulary: int) -> np.ndarray:
    """u8 [vocabulary]: classes of a tokenizer's entries, 0 for what the model has beyond them."""
    require(
        len(classes) <= vocabulary,
        f"the tokenizer has {len(classes):,} entries, the model {vocabulary:,}: it is another model's.",
    )
    return np.pad(classes, (0, vocabulary - len(classes)))


def header_classes(header: dict[str, Any]) -> np.ndarray:
    """u8 [entries of the tokenizer]: the classes that a side-car's header (its JSON) gives to the vocabulary."""
    classes = np.zeros(header["tokenizer"]["vocab_size"], dtype=np.uint8)
    for entry in header["classes"]:
        classes[entry["ids"]] = entry["number"]
    return classes


def _headers(data: DataConfig) -> list[tuple[str, dict[str, Any]]]:
    """(prefix, header) of each dataset of a run whose header is there; the other files may be gone."""
    if data.source == "sample":
        made = prepare_sample(data.cache, vocab_size=data.sample_vocabulary, source=data.sample_text)
        prefixes = [str(made)]
    else:
        paths = [entry["path"] if isinstance(entry, dict) else str(entry) for entry in data.prefixes]
        prefixes = [path.removesuffix(".bin").removesuffix(".idx") for path in paths]
    found = []
    for prefix in prefixes:
        try:
            path = with_suffix(Path(prefix).expanduser(), HEADER_SUFFIX)
            found.append((prefix, json.loads(path.read_text(encoding="utf8"))))
        except (OSError, ValueError):
            continue
    return found


def _beside(headers: list[tuple[str, dict[str, Any]]], folder: Path, data: DataConfig) -> Path:
    """The tokenizer's copy beside the data. Raises UserError when there is none."""
    for prefix, header in headers:
        path = Path(prefix).expanduser().parent / header["tokenizer"]["file"]
        if path.is_file():
            return path
    where = ", ".join(str(entry) for entry in data.prefixes) or "the sample corpus"
    raise UserError(
        f"the tokenizer of {folder} is not found beside its data ({where}): give its file with --tokenizer."
    )


def _classes(headers: list[tuple[str, dict[str, Any]]], tokenizer: Tokenizer, vocabulary: int) -> np.ndarray:
    """u8 [vocabulary]: as the data was annotated for training, or as the tokenizer tells."""
    for _, header in headers:
        if header["tokenizer"]["sha256"] == tokenizer.sha256:
            return pad_classes(header_classes(header), vocabulary)
    return pad_classes(classify(tokenizer.token_bytes()), vocabulary)

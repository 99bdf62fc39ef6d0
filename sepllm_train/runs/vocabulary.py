"""Tokenizer of a run or a model, and the separator class of each entry of its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sample import prepare_sample
from data_prep.separators import classify
from data_prep.sidecar import HEADER_SUFFIX, SidecarHeader, dataset_prefix, read_header, with_suffix
from data_prep.tokenizers import Tokenizer, load_tokenizer
from sepllm_train.base.errors import UserError
from sepllm_train.config.compatibility import TOKENIZER, VOCABULARY
from sepllm_train.config.schema import DataConfig, require

# A tokenizer in the folder of a run or a model, by its kind.
TOKENIZER_NAMES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}


def tokenizer_and_classes(
    folder: Path, data: DataConfig, identity: dict[str, Any], file: Path | None
) -> tuple[Tokenizer, np.ndarray]:
    """Tokenizer of the run in `folder`, and the separator class of each entry of the model's vocabulary, u8 [V].

    identity: of the run's checkpoint. file: the tokenizer, None to look for it in the folder and beside the data.
    Raises UserError when there is none, or it is not the run's.
    """
    trained = identity[TOKENIZER]
    path = file or find_tokenizer(folder)
    require(
        path is not None or bool(trained),
        f"{folder} was imported from a model without a tokenizer: give its file with --tokenizer.",
    )
    # The sample corpus, which would be made now, adds nothing to the tokenizer.
    headers = [] if path is not None and data.source == "sample" else _headers(data)
    found = load_tokenizer(path or _beside(headers, folder, data))
    require(
        # A model that was imported without a tokenizer has none on record.
        trained in ("", found.sha256),
        f"{found.path} is not the tokenizer that {folder} was trained with: give its file with --tokenizer.",
    )
    return found, _classes(headers, found, identity[VOCABULARY])


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


def header_classes(header: SidecarHeader) -> np.ndarray:
    """u8 [entries of the tokenizer]: the classes that a side-car's header gives to the vocabulary."""
    classes = np.zeros(header.tokenizer.vocab_size, dtype=np.uint8)
    for entry in header.classes:
        classes[entry.ids] = entry.number
    return classes


def _headers(data: DataConfig) -> list[tuple[Path, SidecarHeader]]:
    """(prefix, header) of each dataset of a run whose header is there; the other files may be gone."""
    if data.source == "sample":
        made = prepare_sample(data.cache, vocab_size=data.sample_vocabulary, source=data.sample_text)
        prefixes = [made]
    else:
        entries = data.prefixes
        prefixes = [dataset_prefix(entry["path"] if isinstance(entry, dict) else str(entry)) for entry in entries]
    there = [prefix for prefix in prefixes if with_suffix(prefix, HEADER_SUFFIX).is_file()]
    return [(prefix, read_header(prefix, data=False)) for prefix in there]


def _beside(headers: list[tuple[Path, SidecarHeader]], folder: Path, data: DataConfig) -> Path:
    """The tokenizer's copy beside the data. Raises UserError when there is none."""
    for prefix, header in headers:
        path = prefix.parent / header.tokenizer.file
        if path.is_file():
            return path
    where = ", ".join(str(entry) for entry in data.prefixes) or "the sample corpus"
    raise UserError(
        f"the tokenizer of {folder} is not found beside its data ({where}): give its file with --tokenizer."
    )


def _classes(headers: list[tuple[Path, SidecarHeader]], tokenizer: Tokenizer, vocabulary: int) -> np.ndarray:
    """u8 [vocabulary]: as the data was annotated for training, or else from the tokenizer's strings."""
    for _, header in headers:
        if header.tokenizer.sha256 == tokenizer.sha256:
            return pad_classes(header_classes(header), vocabulary)
    return pad_classes(classify(tokenizer.token_bytes()), vocabulary)

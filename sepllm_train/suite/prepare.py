"""The data of a suite: prepared once, from text that the user names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from data_prep.readers import Corpus
from data_prep.sidecar import HEADER_SUFFIX, dataset_prefix, with_suffix
from data_prep.tokenize import tokenize_files, usable_cores
from data_prep.train_tokenizer import train_tokenizer
from sepllm_train.base.console import quantity, say
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import write_json
from sepllm_train.suite.config import SuiteSettings
from sepllm_train.suite.plan import read_json

SOURCE = "source.json"


def data_prefix(config: SuiteSettings, folder: Path) -> str | None:
    """Prefix of the dataset that the runs of a suite in `folder` read; None is the sample corpus.

    Raises UserError for text that is not there.
    """
    suite = config.suite
    if suite.prefix is not None:
        return os.path.abspath(dataset_prefix(suite.prefix))
    if not suite.text:
        return None
    _corpus(config)
    return str((folder / "data" / "text").absolute())


def prepare_data(config: SuiteSettings, folder: Path) -> str | None:
    """`data_prefix`, once the data is there: text is tokenised into `folder`/data by the first call.

    Raises UserError for text or a tokenizer that cannot be read, and for others than those of the first call.
    """
    prefix, suite = data_prefix(config, folder), config.suite
    if prefix is None or not suite.text:
        return prefix
    place = Path(prefix).parent
    source = _source(config)
    if with_suffix(prefix, HEADER_SUFFIX).exists():
        for key, value in read_json(place / SOURCE).items():
            if source[key] != value:
                raise UserError(
                    f"{place} was made with {key} {value!r}, where it is now {source[key]!r}: choose another "
                    "suite.root=, or give what the suite was begun with."
                )
        return prefix
    place.mkdir(parents=True, exist_ok=True)
    tokenizer = suite.tokenizer or str(_train_tokenizer(config, place))
    write_json(place / SOURCE, source)
    header, _ = tokenize_files(suite.text, prefix, tokenizer, unwrap=suite.unwrap, overwrite=True)
    say(f"data: {quantity(header.tokens)} tokens in {header.documents:,} documents, {prefix}")
    return prefix


def _corpus(config: SuiteSettings) -> Corpus:
    """The documents of suite.text. Raises UserError when a file is not there."""
    return Corpus([Path(path).expanduser() for path in config.suite.text], unwrap=config.suite.unwrap)


def _train_tokenizer(config: SuiteSettings, place: Path) -> Path:
    """A tokenizer of the size's vocabulary, trained on the text."""
    model = place / "tokenizer.model"
    say(f"data: training a tokenizer of {config.size.vocabulary:,} entries on {', '.join(config.suite.text)}")
    train_tokenizer(
        (document.text for document in _corpus(config)),
        model,
        vocab_size=config.size.vocabulary,
        workers=usable_cores(),
        overwrite=True,
    )
    return model


def _source(config: SuiteSettings) -> dict[str, Any]:
    """Source of the data: names and sizes of the texts, tokenizer (or entries of its own), and unwrapping."""
    suite = config.suite
    texts = [Path(path).expanduser() for path in suite.text]
    own = f"{config.size.vocabulary} entries, trained on the text"
    return {
        "text": [[path.name, path.stat().st_size] for path in texts],
        "tokenizer": own if suite.tokenizer is None else Path(suite.tokenizer).name,
        "unwrap": suite.unwrap,
    }

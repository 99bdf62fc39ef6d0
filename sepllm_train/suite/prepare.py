"""The data of a suite: prepared once, from text that the user names."""

from __future__ import annotations

import os
from pathlib import Path

from data_prep.readers import Corpus
from data_prep.sidecar import HEADER_SUFFIX, with_suffix
from data_prep.tokenize import tokenize_files, usable_cores
from data_prep.train_tokenizer import train_tokenizer
from sepllm_train.console import quantity, say
from sepllm_train.suite.config import Config


def prepare_data(config: Config, folder: Path) -> str | None:
    """Prefix of the dataset that the runs read; None is the sample corpus.

    Text is tokenised into `folder`/data once; later calls find it there. Raises UserError for text or a tokenizer that
    cannot be read.
    """
    suite = config.suite
    if suite.prefix is not None:
        return os.path.abspath(os.path.expanduser(suite.prefix))
    if not suite.text:
        return None
    prefix = (folder / "data" / "text").absolute()
    if with_suffix(prefix, HEADER_SUFFIX).exists():
        return str(prefix)
    texts = [Path(path).expanduser() for path in suite.text]
    corpus = Corpus(texts, "text", False, suite.unwrap)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = suite.tokenizer
    if tokenizer is None:
        model = prefix.parent / "tokenizer.model"
        say(f"data: training a tokenizer of {config.size.vocabulary:,} entries on {len(texts)} files")
        train_tokenizer(
            (document.text for document in corpus),
            str(model),
            vocab_size=config.size.vocabulary,
            model_type="bpe",
            sentences=1_000_000,
            workers=usable_cores(),
            overwrite=True,
        )
        tokenizer = str(model)
    header, _ = tokenize_files(
        [str(text) for text in texts],
        str(prefix),
        tokenizer,
        text_field="text",
        unwrap=suite.unwrap,
        strict=False,
        workers=None,
        overwrite=True,
    )
    say(f"data: {quantity(header.tokens)} tokens in {header.documents:,} documents, {prefix}")
    return str(prefix)

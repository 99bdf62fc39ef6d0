"""A small real tokenizer and corpus, made from the source of modules that every Python has."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

import pytest

from data_prep.tokenize import tokenize_files
from data_prep.train_tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Forty documents of real text."""
    source = "\n".join(Path(module.__file__).read_text(encoding="utf8") for module in (argparse, textwrap, json))
    lines = source.splitlines(keepends=True)
    return ["".join(lines[start : start + len(lines) // 40]) for start in range(0, len(lines), len(lines) // 40)]


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def trained(request: pytest.FixtureRequest, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece tokenizer of each algorithm."""
    path = tmp_path_factory.mktemp("tokenizers") / f"{request.param}.model"
    train_tokenizer(texts, path, vocab_size=600, model_type=request.param)
    return path


@pytest.fixture(scope="session")
def small_tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE tokenizer with 600 entries."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer(texts, path, vocab_size=600)
    return path


@pytest.fixture(scope="session")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents as a .jsonl file."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf8")
    return path


@pytest.fixture
def dataset(corpus: Path, small_tokenizer: Path, tmp_path: Path) -> Path:
    """Prefix of the documents as a fresh tokenised dataset."""
    tokenize_files([corpus], tmp_path / "data" / "set", small_tokenizer)
    return tmp_path / "data" / "set"

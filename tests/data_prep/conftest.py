"""A small real tokenizer and corpus, made from the source of this project: the same with every Python."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from data_prep.tokenize import tokenize_files
from data_prep.train_tokenizer import train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Forty documents of real text."""
    source = "".join(path.read_text(encoding="utf8") for path in sorted((REPOSITORY / "data_prep").glob("*.py")))
    lines = source.splitlines(keepends=True)
    ends = [len(lines) * number // 40 for number in range(41)]
    return ["".join(lines[start:end]) for start, end in pairwise(ends)]


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

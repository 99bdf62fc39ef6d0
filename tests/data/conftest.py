"""Two small datasets of real text beside each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_prep.sidecar import read_header
from data_prep.tokenizers import load_tokenizer
from tests.support.command import command

main = command("prepare")


@pytest.fixture(scope="session")
def prefixes(sample_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two datasets made of halves of the sample corpus by `tokenize`."""
    folder = tmp_path_factory.mktemp("blend")
    header = read_header(sample_prefix)
    tokenizer_file = sample_prefix.parent / header.tokenizer.file
    tokenizer = load_tokenizer(tokenizer_file)
    store = IndexedDataset(str(sample_prefix), multimodal=False, mmap=True)
    texts = [tokenizer.decode(store[n][:-1].astype(np.int64).tolist()) for n in range(60)]
    made = []
    for name, part in (("prose", texts[:30]), ("notes", texts[30:])):
        source = folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in part), encoding="utf8")
        assert main(["tokenize", str(source), "--output", str(folder / name), "--tokenizer", str(tokenizer_file)]) == 0
        made.append(str(folder / name))
    return made[0], made[1]

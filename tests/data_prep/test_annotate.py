"""Side-cars for datasets of megatron-core's own builder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from data_prep.annotate import annotate
from data_prep.sidecar import open_classes, read_header
from data_prep.tokenizers import load_tokenizer
from data_prep.verify import verify
from sepllm_train.base.errors import UserError


def _build(prefix: Path, documents: list[list[int]], dtype: type[np.integer]) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_same_side_car_as_tokenising(
    dataset: Path, tmp_path: Path, texts: list[str], small_tokenizer: Path, dtype: type[np.integer]
) -> None:
    tokenizer = load_tokenizer(small_tokenizer)
    _build(tmp_path / "other", [[*ids, tokenizer.eod] for ids in tokenizer.encode_batch(texts)], dtype)
    header = annotate(tmp_path / "other", small_tokenizer)
    expected = read_header(dataset)
    assert header == read_header(tmp_path / "other") == verify(tmp_path / "other", small_tokenizer)
    assert np.array_equal(open_classes(tmp_path / "other"), open_classes(dataset))
    assert (header.classes, header.tokens, header.documents) == (expected.classes, expected.tokens, expected.documents)
    assert header.bytes == expected.bytes
    assert (header.files[".bin"] == expected.files[".bin"]) == (dtype is np.uint16)


def test_token_outside_the_vocabulary(tmp_path: Path, small_tokenizer: Path) -> None:
    for name, bad in (("high", 600), ("low", -3)):
        _build(tmp_path / name, [[4, 5, bad], [7]], np.int32)
        with pytest.raises(
            UserError, match=rf"{name}\.bin holds token id {bad}, outside the tokenizer's vocabulary of 600"
        ):
            annotate(tmp_path / name, small_tokenizer)
        assert not list(tmp_path.glob(f"{name}.sep*"))


def test_existing_side_car_is_kept(dataset: Path, small_tokenizer: Path) -> None:
    with pytest.raises(UserError, match=r"set\.sep\.bin exists already"):
        annotate(dataset, small_tokenizer)
    assert annotate(dataset, small_tokenizer, overwrite=True) == verify(dataset)


def test_damaged_datasets(dataset: Path, small_tokenizer: Path) -> None:
    index, tokens = Path(f"{dataset}.idx"), Path(f"{dataset}.bin")
    whole_index, whole_tokens = index.read_bytes(), tokens.read_bytes()
    tokens.write_bytes(whole_tokens[:-10])
    with pytest.raises(UserError, match=r"set\.bin holds [\d,]+ tokens where set\.idx says [\d,]+: copy or make"):
        annotate(dataset, small_tokenizer, overwrite=True)
    for content, message in (
        (whole_index[:-10], r"set\.idx is cut short \(it announces 40 sequences\)"),
        (whole_index[:20], r"set\.idx is not an index of megatron-core"),
        (b"x" + whole_index, r"set\.idx is not an index of megatron-core"),
        (whole_index[:17] + b"\x06" + whole_index[18:], r"set\.idx has version 1 and token type 6"),
    ):
        index.write_bytes(content)
        with pytest.raises(UserError, match=message):
            annotate(dataset, small_tokenizer, overwrite=True)
    index.unlink()
    with pytest.raises(UserError, match=r"set\.idx is missing: give the path of a tokenised dataset"):
        annotate(dataset, small_tokenizer, overwrite=True)

"""A damaged `.idx` is refused by annotate, verify and training, and what a data key stands for is all that it names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data_prep.annotate import annotate
from data_prep.sidecar import read_header
from data_prep.verify import verify
from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import Config, DataConfig, TrainingConfig
from sepllm_train.data.corpus import open_corpus
from sepllm_train.data.splits import build_datasets
from tests.support.datasets import copy_dataset, edit_header, index_bytes, index_lengths, rewrite


@pytest.fixture(autouse=True)
def alone() -> Any:
    """megatron-core asks for the rank: a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config_for(prefix: str | Path, cache: Path) -> Config:
    """A run on one dataset."""
    data = DataConfig(source="prefixes", prefixes=[str(prefix)], sequence_length=64, cache=str(cache))
    return Config(data=data, training=TrainingConfig(steps=20, global_batch=4, micro_batch=2))


def train(prefix: Path, cache: Path) -> Any:
    """The endless training dataset."""
    config = config_for(prefix, cache)
    return build_datasets(config, open_corpus(config.data))[0]


def programs(prefix: Path, cache: Path) -> dict[str, Callable[[], object]]:
    """The three programs that read an index."""
    tokenizer = prefix.with_name(f"{prefix.name}.tokenizer.model")
    return {
        "annotate": lambda: annotate(prefix, tokenizer, overwrite=True, progress=False),
        "verify": lambda: verify(prefix),
        "training": lambda: train(prefix, cache),
    }


def _swapped(values: list[int]) -> list[int]:
    return [*values[1::-1], *values[2:]]


def _damages(lengths: list[int]) -> dict[str, tuple[bytes, str]]:
    starts = [2 * int(end) for end in np.cumsum([0, *lengths[:-1]])]
    count = len(lengths)
    whole = index_bytes(lengths)
    return {
        "pointers all 0": (index_bytes(lengths, pointers=[0] * count), "sequence 2 lies at byte 0, not at"),
        "pointers swapped": (index_bytes(lengths, pointers=_swapped(starts)), "sequence 1 lies at byte"),
        "pointer negative": (index_bytes(lengths, pointers=[-2, *starts[1:]]), "sequence 1 lies at byte -2"),
        "pointer beyond": (index_bytes(lengths, pointers=[*starts[:-1], 1 << 40]), f"sequence {count} lies at byte"),
        "length negative": (
            index_bytes([lengths[0] + 5, -5, *lengths[1:]]),
            "sequence 2 has a length of -5",
        ),
        "no boundaries": (index_bytes(lengths, []), "no document boundaries"),
        "boundaries fall": (
            index_bytes(lengths, _swapped(list(range(count + 1)))),
            "boundaries do not rise from 0 to",
        ),
        "boundaries beyond": (index_bytes(lengths, [*range(count), count + 7]), "boundaries do not rise from 0 to"),
        "boundaries too low": (index_bytes(lengths, [-1, *range(1, count + 1)]), "boundaries do not rise from 0 to"),
        "boundaries stop": (index_bytes(lengths, range(count)), "boundaries do not rise from 0 to"),
        "i8 for u16": (index_bytes(lengths, code=2), "sequence 2 lies at byte"),
        "i32 for u16": (index_bytes(lengths, code=4), "lies at byte|where .*idx says"),
        "floats": (index_bytes(lengths, code=6), "token type 6"),
        "cut": (whole[:-10], "cut short"),
        "cut in the header": (whole[:20], "not an index of megatron-core"),
        "more at its end": (whole + b"12345", "5 bytes more"),
        "huge counts": (whole[:18] + b"\xff" * 16 + whole[34:], "cut short"),
    }


@pytest.mark.parametrize("program", ["annotate", "verify", "training"])
def test_damaged_indices_are_refused(prefixes: tuple[str, str], tmp_path: Path, program: str) -> None:
    lengths = index_lengths(prefixes[0])
    for number, (damage, (content, words)) in enumerate(_damages(lengths).items()):
        prefix = copy_dataset(prefixes[0], tmp_path / str(number), "set")
        rewrite(prefix, ".idx", content)
        with pytest.raises(UserError, match=words) as caught:
            programs(prefix, tmp_path / "cache")[program]()
            pytest.fail(f"{program} took an index with {damage}")
        assert "\n" not in str(caught.value), damage


@pytest.mark.parametrize("program", ["annotate", "verify", "training"])
def test_a_token_type_that_does_not_hold_the_vocabulary(
    program: str, prefixes: tuple[str, str], tmp_path: Path, shared_data: Path
) -> None:
    """i16 for u16: ids from 32,768 on would be read as negative ones, also where none occurs in the first documents."""
    tokenizer = shared_data / "tokenizers" / "20B_tokenizer.json"
    prefix = tmp_path / "set"
    Path(f"{prefix}.bin").write_bytes(np.array([*range(200), 0] * 40, dtype=np.uint16).tobytes())
    Path(f"{prefix}.idx").write_bytes(index_bytes([201] * 40))
    annotate(prefix, tokenizer, progress=False)
    rewrite(prefix, ".idx", index_bytes([201] * 40, code=3))
    reads = {**programs(prefix, tmp_path), "annotate": lambda: annotate(prefix, tokenizer, overwrite=True)}
    with pytest.raises(UserError, match=r"set\.idx declares tokens of int16, which cannot hold .* 50,277 entries"):
        reads[program]()


def test_an_index_that_its_header_does_not_know(prefixes: tuple[str, str], tmp_path: Path) -> None:
    """Other documents and the same size: training sees what `verify` sees."""
    prefix = copy_dataset(prefixes[0], tmp_path)
    lengths = index_lengths(prefix)
    Path(f"{prefix}.idx").write_bytes(index_bytes([lengths[0] - 1, lengths[1] + 1, *lengths[2:]]))
    for program in ("verify", "training"):
        with pytest.raises(UserError, match=r"prose\.idx was changed after it was written"):
            programs(prefix, tmp_path)[program]()


def test_documents_of_several_sequences(prefixes: tuple[str, str], tmp_path: Path) -> None:
    """Document starts, held-out documents and their order follow the documents, not the sequences they are kept in."""
    whole, parts = (copy_dataset(prefixes[0], tmp_path / name, "set") for name in ("whole", "parts"))
    lengths = index_lengths(whole)
    cut = [part for length in lengths for part in (1, length - 1)]
    rewrite(parts, ".idx", index_bytes(cut, range(0, len(cut) + 1, 2)))
    verify(parts)
    one, several = train(whole, tmp_path / "cache"), train(parts, tmp_path / "cache")
    assert len(one.dataset) == len(several.dataset)
    for number in (*range(20), 3 * len(one.dataset) + 1):
        for key, value in one[number].items():
            assert torch.equal(several[number][key], value), key
        assert one.documents(number)[1] == several.documents(number)[1]


def test_documents_of_no_tokens(prefixes: tuple[str, str], tmp_path: Path) -> None:
    """megatron-core's builder writes them for empty texts."""
    prefix = copy_dataset(prefixes[0], tmp_path)
    lengths = index_lengths(prefix)
    rewrite(prefix, ".idx", index_bytes([lengths[0], 0, *lengths[1:]], [0, 1, 1, *range(2, len(lengths) + 2)]))
    edit_header(prefix, lambda header: header.update(documents=header["documents"] + 2))
    verify(prefix)
    dataset = train(prefix, tmp_path / "cache")
    assert all(len(dataset[number]["tokens"]) == 64 for number in range(len(dataset.dataset)))


def test_other_documents_of_the_same_tokens_are_other_data(prefixes: tuple[str, str], tmp_path: Path) -> None:
    """One name, one `.bin`, one cache: neither the index nor what checkpoints record is taken for the other's."""
    first, second = (copy_dataset(prefixes[0], tmp_path / name, "set") for name in ("first", "second"))
    lengths = index_lengths(first)
    joined = [lengths[0] + lengths[1], *lengths[2:]]
    rewrite(second, ".idx", index_bytes(joined))
    edit_header(second, lambda header: header.update(documents=len(joined)))
    cache, fresh = tmp_path / "cache", tmp_path / "fresh"
    train(first, cache)
    after, alone = train(second, cache), train(second, fresh)
    assert all(torch.equal(after[n]["tokens"], alone[n]["tokens"]) for n in range(len(alone.dataset)))
    identities = [open_corpus(config_for(prefix, cache).data).identity() for prefix in (first, second)]
    assert identities[0] != identities[1]
    assert len([path for path in (cache / "index").iterdir() if path.is_dir()]) == 2


def test_two_datasets_of_the_same_tokens_in_one_blend(prefixes: tuple[str, str], tmp_path: Path) -> None:
    """Their indices do not share a file."""
    first, second = (copy_dataset(prefixes[0], tmp_path, name) for name in ("first", "second"))
    lengths = index_lengths(first)
    joined = [lengths[0] + lengths[1], *lengths[2:]]
    rewrite(second, ".idx", index_bytes(joined))
    edit_header(second, lambda header: header.update(documents=len(joined)))
    config = config_for(first, tmp_path / "cache")
    config.data.prefixes.append(str(second))
    blend = build_datasets(config, open_corpus(config.data))[0]
    alone = train(second, tmp_path / "alone")
    again = blend.datasets[1]
    assert all(torch.equal(again[n]["tokens"], alone[n]["tokens"]) for n in range(len(alone.dataset)))


def test_other_separators_of_the_same_tokens_are_other_data(prefixes: tuple[str, str], tmp_path: Path) -> None:
    first, second = (copy_dataset(prefixes[0], tmp_path / name, "set") for name in ("first", "second"))
    rewrite(second, ".sep.bin", bytes(read_header(second).tokens))
    corpora = [open_corpus(config_for(prefix, tmp_path).data) for prefix in (first, second)]
    assert corpora[0].identity() != corpora[1].identity()

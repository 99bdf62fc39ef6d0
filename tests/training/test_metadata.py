"""`.metadata` is read without running it, in bounded memory, and is the description of whole tensors or refused."""

from __future__ import annotations

import itertools
import pickle
import random
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata

from sepllm_train.base.errors import UserError
from sepllm_train.training.checkpoint import digest
from sepllm_train.training.checkpoint.metadata import fills, read_metadata

ARCHIVE = Path(__file__).resolve().parents[1] / "golden" / "files" / "run.tar.gz"
HEAD = pickle.PROTO + b"\x04"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that an earlier version wrote; tests put back its `.metadata`."""
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.rglob(".metadata")).parent


def refusal(stored: Path, content: bytes) -> str:
    """The message about a checkpoint with this `.metadata`."""
    path = stored / ".metadata"
    whole = path.read_bytes()
    try:
        path.write_bytes(content)
        with pytest.raises((UserError, pickle.UnpicklingError)) as refused:
            read_metadata(stored)
        return str(refused.value)
    finally:
        path.write_bytes(whole)


def test_what_is_read_is_what_torch_would_unpickle(stored: Path) -> None:
    ours, theirs = read_metadata(stored), pickle.loads((stored / ".metadata").read_bytes())
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_binary_pickles_is_read(stored: Path, tmp_path: Path, protocol: int) -> None:
    theirs = pickle.loads((stored / ".metadata").read_bytes())
    for file in stored.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / ".metadata").unlink()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(theirs, protocol))
    assert read_metadata(tmp_path).storage_data == theirs.storage_data


def named(module: str, name: str) -> bytes:
    """Operation that puts a type on the stack."""
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


TORCH = "torch.distributed.checkpoint.metadata"
ATTACKS = {
    # The state of a class, not of an object: attributes of torch's own class would change.
    "build_class": named(TORCH, "Metadata") + b"}(\x8c\x07planted\x8c\x03yesu" + pickle.BUILD + pickle.STOP,
    "build_class_slots": named(TORCH, "Metadata") + b"N}(\x8c\x07planted\x8c\x03yesu\x86" + pickle.BUILD + pickle.STOP,
    "build_twice": named(TORCH, "Metadata") + b")\x81}b}b" + pickle.STOP,
    "build_function": named("torch.serialization", "_get_layout") + b"}b" + pickle.STOP,
    "build_dtype": named("torch", "float32") + b"}b" + pickle.STOP,
    "call_text": b"\x8c\x02hi)R" + pickle.STOP,
    "call_dict": b"})R" + pickle.STOP,
    "new_without_arguments": named("torch", "Size") + b"N\x81" + pickle.STOP,
    "eval": named("builtins", "eval") + b"\x8c\x011\x85R" + pickle.STOP,
    "dotted": named(TORCH, "Metadata.__init__") + b")R" + pickle.STOP,
    "inst": b"(" + pickle.INST + f"{TORCH}\nMetadata\n".encode() + pickle.STOP,
    "object": b"(" + named(TORCH, "Metadata") + pickle.OBJ + pickle.STOP,
    "new_with_keywords": named(TORCH, "Metadata") + b")}" + pickle.NEWOBJ_EX + pickle.STOP,
    "extension": pickle.EXT1 + b"\x01" + pickle.STOP,
    "persistent": b"\x8c\x01a" + pickle.BINPERSID + pickle.STOP,
    "number_of_digits": pickle.LONG + b"9" * 4000 + b"L\n" + pickle.STOP,
    "number_of_bytes": pickle.LONG4 + struct.pack("<i", 1 << 30) + pickle.STOP,
    "text_of_bytes": pickle.BINBYTES8 + struct.pack("<Q", 1 << 60) + pickle.STOP,
    "frame": pickle.FRAME + struct.pack("<Q", 1 << 62) + pickle.STOP,
    "memo": b"]" + pickle.LONG_BINPUT + struct.pack("<I", (1 << 32) - 1) + pickle.STOP,
    "unhashable": b"}]Ns" + pickle.STOP,
    "deep_key": b"}" + b")" + b"\x85" * 100_000 + b"Ns" + pickle.STOP,
    "endless": b"]" * 100_000,
    "nothing": b"",
    "wrong_kind": b"]" + pickle.STOP,
    "not_pickle": b"PK\x03\x04",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_operations_beside_a_description_are_refused(stored: Path, attack: bytes) -> None:
    """None of them calls, changes or fills anything: torch's types are as they were."""
    before = {kind: dict(vars(kind)) for kind in (Metadata, TensorStorageMetadata, ChunkStorageMetadata, torch.Size)}
    message = refusal(stored, HEAD + attack)
    assert "\n" not in message
    assert {kind: dict(vars(kind)) for kind in before} == before


def without_a_record(metadata: Any) -> None:
    metadata.storage_data.popitem()


def record_of_another(metadata: Any) -> None:
    first, second, *_ = metadata.storage_data
    metadata.storage_data[first] = metadata.storage_data[second]


def record_beyond_its_file(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).length = 1 << 40


def record_of_few_bytes(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).length = 1


def record_in_another_folder(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).relative_path = "../run.json"


def record_in_no_file(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).relative_path = "__9_0.distcp"


def transformed(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]


def negative(metadata: Any) -> None:
    next(iter(metadata.state_dict_metadata.values())).chunks[0].offsets = (-1,)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (without_a_record, "is not whole: a part of it is in no file"),
        (record_of_another, "is not whole: a part of it is"),
        (record_beyond_its_file, "is not whole: __0_0.distcp ends before a part of it"),
        (record_of_few_bytes, "is not whole: a part of it is stored in too few bytes"),
        (record_in_another_folder, "refers to '../run.json', which is no file of tensors"),
        (record_in_no_file, "is not whole: __9_0.distcp ends before a part of it"),
        (transformed, "stored transformed"),
        (negative, "a shape that no tensor has"),
    ],
)
def test_tensors_without_a_whole_record_are_refused(stored: Path, harm: Callable[[Any], None], words: str) -> None:
    metadata = pickle.loads((stored / ".metadata").read_bytes())
    harm(metadata)
    assert words in refusal(stored, pickle.dumps(metadata))


def test_mutated_metadata_is_read_or_refused(stored: Path) -> None:
    whole, draw = (stored / ".metadata").read_bytes(), random.Random(1)
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (stored / ".metadata").write_bytes(content)
        try:
            read_metadata(stored)
        except (UserError, pickle.UnpicklingError):
            continue
        finally:
            (stored / ".metadata").write_bytes(whole)
    assert len(digest(stored)) == 64


def filled(blocks: Sequence[tuple[Sequence[int], Sequence[int]]], shape: Sequence[int]) -> bool:
    """As `fills`, by counting how often each element is covered."""
    room = np.zeros([2 * size + 3 for size in shape], dtype=int)
    for corner, sizes in blocks:
        room[tuple(slice(low, low + size) for low, size in zip(corner, sizes, strict=True))] += 1
    inside = tuple(slice(0, size) for size in shape)
    return bool((room[inside] == 1).all()) and room.sum() == room[inside].sum()


def test_blocks_fill_a_tensor_when_each_element_is_covered_once() -> None:
    draw, outcomes = random.Random(3), []
    for _ in range(3000):
        shape = [draw.randint(1, 3) for _ in range(draw.randint(1, 3))]
        cuts = [sorted({0, draw.randint(0, size), size}) for size in shape]
        grid = [[(low, high - low) for low, high in itertools.pairwise(cut)] for cut in cuts]
        blocks = [tuple(zip(*cell, strict=True)) for cell in itertools.product(*grid)]
        for _ in range(draw.choice((0, 0, 1, 2))):
            number = draw.randrange(len(blocks))
            corner, sizes = (list(part) for part in blocks[number])
            draw.choice((corner, sizes))[draw.randrange(len(shape))] = draw.randint(1, 3)
            blocks[number] = (tuple(corner), tuple(sizes))
        if draw.random() < 0.2:
            blocks.append(draw.choice(blocks))
        outcomes.append(filled(blocks, shape))
        assert fills(blocks, shape) == outcomes[-1], (blocks, shape)
    assert 500 < sum(outcomes) < 2500
    assert fills([((), ())], ()) and fills([], (0, 4)) and not fills([], (2,)) and not fills([], ())

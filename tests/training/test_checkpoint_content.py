"""What a checkpoint holds: loading it runs no code, and tensors that are not whole are refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from sepllm_train.base.errors import UserError
from sepllm_train.base.files import hash_file
from sepllm_train.training.checkpoint import (
    digest,
    files,
    load,
    load_weights,
)
from sepllm_train.training.checkpoint.load import StoredTensors, whole_tensors
from sepllm_train.training.setup import Training
from tests.training.checkpoints import save_steps, update


class Evil:
    """Pickled, this creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def evil_metadata(checkpoint: Path, mark: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(mark)))


def evil_member_of_metadata(checkpoint: Path, mark: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = Evil(mark)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def evil_tensor(checkpoint: Path, mark: Path) -> None:
    point_at_evil_file(checkpoint, mark)


def evil_object_for_a_tensor(checkpoint: Path, mark: Path) -> None:
    metadata = point_at_evil_file(checkpoint, mark)
    name = min(metadata.state_dict_metadata)
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(name)] = _StorageInfo(
        "evil.distcp", 0, (checkpoint / "evil.distcp").stat().st_size
    )
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def point_at_evil_file(checkpoint: Path, mark: Path) -> Any:
    """Make a tensor's record one that creates a file."""
    torch.save(Evil(mark), checkpoint / "evil.distcp")
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    size = (checkpoint / "evil.distcp").stat().st_size
    name = min(metadata.state_dict_metadata)
    for index in metadata.storage_data:
        if index.fqn == name:
            metadata.storage_data[index] = _StorageInfo("evil.distcp", 0, size)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    return metadata


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (evil_metadata, "refers to pathlib"),
        (evil_member_of_metadata, "refers to pathlib"),
        (evil_tensor, "Weights only load failed"),
        (evil_object_for_a_tensor, "BytesStorageMetadata, which no checkpoint needs"),
    ],
)
def test_loading_runs_no_code(
    tmp_path: Path, training: Training, plant: Callable[[Path, Path], None], words: str, capfd: Any
) -> None:
    (saved,) = save_steps(tmp_path, training, 2)
    mark = tmp_path / "mark"
    plant(saved, mark)
    sign(saved)
    assert files.damage(saved) is None and files.altered(saved, 0, 1) is None
    with pytest.raises(UserError, match=f"cannot be loaded.*{words}"):
        load(saved, training)
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(UserError, match=f"cannot be read.*{words}"):
        digest(saved)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists(), "the pickle would not have done anything"


def test_blocks_of_stored_tensors_are_those_of_the_whole(tmp_path: Path, training: Training) -> None:
    """With zeros beyond its end."""
    (saved,) = save_steps(tmp_path, training, 2)
    stored = StoredTensors(saved)
    whole = dict(whole_tensors(saved))
    assert list(whole) == list(stored.entries)
    name = "decoder.layers.mlp.linear_fc1.weight"
    assert len(stored.entries[name].chunks) > 1
    for corner, shape in (((0, 0, 0), (2, 128, 64)), ((1, 100, 3), (1, 20, 7)), ((0, 120, 60), (2, 16, 8))):
        beyond = torch.zeros(2, 136, 68)
        beyond[:, :128, :64] = whole[name]
        block = tuple(slice(low, low + size) for low, size in zip(corner, shape, strict=True))
        assert torch.equal(stored.read(name, corner, shape), beyond[block])


def test_common_file_is_not_read(tmp_path: Path, training: Training) -> None:
    (saved,) = save_steps(tmp_path, training, 2)
    torch.save(Evil(tmp_path / "mark"), saved / "common.pt")
    sign(saved)
    load(saved, training)
    assert not (tmp_path / "mark").exists()


def test_files_outside_of_the_checkpoint_are_not_read(tmp_path: Path, training: Training) -> None:
    (saved,) = save_steps(tmp_path, training, 2)
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    index = next(iter(metadata.storage_data))
    metadata.storage_data[index] = _StorageInfo("../../../elsewhere", 0, 10)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="elsewhere', which is no file of tensors in the checkpoint"):
        load(saved, training)


def first_part_missing(entry: Any) -> None:
    del entry.chunks[0]


def last_part_twice(entry: Any) -> None:
    entry.chunks[0] = entry.chunks[-1]


def parts_overlap(entry: Any) -> None:
    """As many elements as the whole has, and the first ones in no part."""
    entry.chunks[0].offsets = torch.Size([0, 1, *entry.chunks[0].offsets[2:]])


def part_beyond_the_shape(entry: Any) -> None:
    entry.chunks[-1].offsets = torch.Size([entry.size[0], *entry.chunks[-1].offsets[1:]])


def shape_beyond_the_parts(entry: Any) -> None:
    entry.size = torch.Size([entry.size[0], entry.size[1] + 1, *entry.size[2:]])


@pytest.mark.parametrize("prefix", ["", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."])
@pytest.mark.parametrize(
    "harm", [first_part_missing, last_part_twice, parts_overlap, part_beyond_the_shape, shape_beyond_the_parts]
)
def test_tensor_that_is_not_whole_is_refused_before_anything_is_loaded(
    tmp_path: Path, training: Training, prefix: str, harm: Callable[[Any], None]
) -> None:
    """What no part of the checkpoint covers would be whatever the memory held before."""
    (saved,) = save_steps(tmp_path, training, 2)
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    name = f"{prefix}decoder.layers.mlp.linear_fc1.weight"
    harm(metadata.state_dict_metadata[name])
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(saved)
    update(training)
    before = [p.detach().clone() for chunk in training.chunks for p in chunk.parameters()]
    for attempt in (lambda: load(saved, training), lambda: load_weights(saved, training.modules)):
        with pytest.raises(UserError, match=f"cannot be loaded.*{name} is not whole"):
            attempt()
    assert all(torch.equal(a, b) for a, b in zip(before, training.chunks[0].parameters(), strict=True))
    with pytest.raises(UserError, match=f"{name} is not whole"):
        digest(saved)


def test_embedding_of_fewer_entries_than_the_vocabulary_is_refused(tmp_path: Path, training: Training) -> None:
    """Its rows may be more or fewer than those of another layout's padding, and those that lack are 0."""
    (saved,) = save_steps(tmp_path, training, 2)
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"identity": {"model.vocabulary": 1000}}))
    load(saved, training)
    name = "embedding.word_embeddings.weight"
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata[name]
    entry.size = entry.chunks[0].sizes = torch.Size([999, 64])
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"embedding.word_embeddings.weight has the shape \[999, 64\]"):
        load(saved, training)


def sign(checkpoint: Path) -> None:
    """Write the manifest that fits the files as they are."""
    entries = {}
    for path in checkpoint.iterdir():
        if path.name != "manifest.json":
            info = hash_file(path)
            entries[path.name] = {"bytes": info.size, "sha256": info.sha256}
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": entries}))

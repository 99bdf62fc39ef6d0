"""torch's `.metadata` of a checkpoint: names, shapes and places of its tensors, read without running anything in it.

The file is a pickle, a program for a small machine. Here that machine has the operations that describe tensors and no
others, it makes no objects but plain containers and records of what the file asks for, and what these say is checked
before torch's own objects are made of it.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from sepllm_train.base.parsing import read_bytes
from sepllm_train.training.checkpoint.files import METADATA as NAME
from sepllm_train.training.checkpoint.files import TENSORS

# Checkpoints of thousands of ranks have less, and what is made of it in memory is some fifty times as large.
LARGEST = 1 << 26
# Axes of a tensor: a parameter of all layers has three, an RNG state four.
_MOST_AXES = 8
_LONGEST = 1 << 62

_PLACES = "torch.distributed.checkpoint.filesystem"
_PARTS = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (_PLACES, "_StorageInfo"),
    *((_PARTS, name) for name in ("_MEM_FORMAT_ENCODING", "ChunkStorageMetadata", "Metadata", "MetadataIndex")),
    *((_PARTS, name) for name in ("StorageMeta", "TensorProperties", "TensorStorageMetadata")),
}


def read_metadata(checkpoint: Path) -> Metadata:
    """Read `.metadata` of a checkpoint and check it against the files beside it.

    Raises UserError when there is none that can be read, and UnpicklingError when it holds anything else than the
    description of whole tensors in files of the checkpoint.
    """
    content = read_bytes(checkpoint / NAME, "resume from another checkpoint", LARGEST, "torch metadata")
    try:
        metadata = _metadata(_Machine(io.BytesIO(content)).load())
    except pickle.UnpicklingError:
        raise
    except (
        AttributeError, EOFError, IndexError, KeyError, OverflowError, TypeError, ValueError, struct.error
    ) as error:  # fmt: skip
        raise pickle.UnpicklingError(f"{NAME} is not a description of tensors ({type(error).__name__})") from None
    _check_whole(metadata)
    _check_places(metadata, checkpoint)
    return metadata


@dataclass(frozen=True, eq=False)
class _Kind:
    """A type that the file names."""

    module: str
    name: str


@dataclass(eq=False)
class _Made:
    """An object that the file asks for: its type, the arguments of the constructor, and its state."""

    kind: _Kind
    arguments: Any
    state: Any = None


class _Machine(pickle._Unpickler):
    """Python's own unpickler, reduced to the operations of a description of tensors. Calls nothing."""

    # Of the base class, as it has them at run time.
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> _Kind:
        """Return a record of the type. Raises UnpicklingError unless it describes tensors."""
        if (module, name) in _KNOWN or (module == "torch" and _dtype(name) is not None):
            return _Kind(module, name)
        raise pickle.UnpicklingError(f"{NAME} refers to {module}.{name}, which no checkpoint needs")

    def load(self) -> Any:
        """Return what the file describes. Raises UnpicklingError for an operation that is not among those here."""
        try:
            return super().load()
        except KeyError as error:
            raise pickle.UnpicklingError(f"{NAME} holds an operation that no checkpoint needs ({error})") from None

    def _make(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, _Kind) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError(f"{NAME} makes something that is no part of a checkpoint")
        self.append(_Made(kind, arguments))

    def _build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if not isinstance(made, _Made) or made.state is not None:
            raise pickle.UnpicklingError(f"{NAME} changes something that is no part of a checkpoint")
        made.state = state

    def _set_items(self) -> None:
        items = self.pop_mark()
        self._set(items)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        # Other keys are slow to hash, or all alike.
        if type(target) is not dict or not all(isinstance(key, str | _Made) for key in items[::2]):
            raise pickle.UnpicklingError(f"{NAME} holds a table that is no part of a checkpoint")
        target.update(zip(items[::2], items[1::2], strict=True))

    _AS_USUAL = (
        "PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 "
        "BININT2 LONG1 SHORT_BINUNICODE BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS "
        "EMPTY_DICT GLOBAL STACK_GLOBAL"
    )
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: pickle._Unpickler.dispatch[code]
        for code in (getattr(pickle, name)[0] for name in _AS_USUAL.split())
    } | {
        pickle.REDUCE[0]: _make,
        pickle.NEWOBJ[0]: _make,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
    }  # fmt: skip


def _dtype(name: str) -> torch.dtype | None:
    found = vars(torch).get(name)
    return found if isinstance(found, torch.dtype) else None


def _metadata(root: Any) -> Metadata:
    """torch's objects for what the file describes. Raises UnpicklingError for anything but tensors and their places."""
    state = _state(root, "Metadata")
    tensors: dict[str, Any] = {
        _text(name): _tensor(_text(name), entry) for name, entry in _table(state["state_dict_metadata"]).items()
    }
    places = {_index(index): _place(place) for index, place in _table(state["storage_data"]).items()}
    return Metadata(tensors, storage_data=places)


def _state(made: Any, name: str) -> dict[str, Any]:
    """State of an object of the type `name`."""
    if not isinstance(made, _Made) or made.kind.name != name or type(made.state) is not dict:
        raise pickle.UnpicklingError(f"{NAME} does not describe a checkpoint: a {name} is missing")
    return made.state


def _tensor(name: str, entry: Any) -> TensorStorageMetadata:
    if not isinstance(entry, _Made) or entry.kind.name != "TensorStorageMetadata":
        raise pickle.UnpicklingError(f"{name} is not stored as a tensor")
    state = _state(entry, "TensorStorageMetadata")
    properties = state["properties"]
    if not isinstance(properties, _Made) or type(properties.state) is not tuple or not properties.state:
        raise pickle.UnpicklingError(f"{name} has no type of elements")
    kind = properties.state[0]
    dtype = _dtype(kind.name) if isinstance(kind, _Kind) and kind.module == "torch" else None
    if dtype is None or type(state["chunks"]) is not list:
        raise pickle.UnpicklingError(f"{name} has no type of elements, or no list of parts")
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in state["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype),
        _size(state["size"]),
        [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _index(made: Any) -> MetadataIndex:
    state = _state(made, "MetadataIndex")
    offset = state.get("offset")
    return MetadataIndex(_text(state["fqn"]), None if offset is None else _size(offset))


def _place(made: Any) -> _StorageInfo:
    state = _state(made, "_StorageInfo")
    path, offset, length = _text(state["relative_path"]), _number(state["offset"]), _number(state["length"])
    if Path(path).name != path or "\0" in path or not path.endswith(TENSORS):
        raise pickle.UnpicklingError(f"{NAME} refers to {path[:80]!r}, which is no file of tensors in the checkpoint")
    if state.get("transform_descriptors"):
        raise pickle.UnpicklingError(f"{NAME} describes tensors that are stored transformed")
    return _StorageInfo(path, offset, length)


def _size(made: Any) -> torch.Size:
    """A torch.Size of numbers of 0 or more."""
    sizes = made.arguments[0] if isinstance(made, _Made) and len(made.arguments) == 1 else None
    if type(sizes) is not tuple or len(sizes) > _MOST_AXES:
        raise pickle.UnpicklingError(f"{NAME} holds a shape that no tensor has")
    return torch.Size([_number(size) for size in sizes])


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LONGEST:
        raise pickle.UnpicklingError(f"{NAME} holds a size that no tensor has")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise pickle.UnpicklingError(f"{NAME} holds a name that is no text")
    return value


def _table(value: Any) -> dict[Any, Any]:
    if type(value) is not dict:
        raise pickle.UnpicklingError(f"{NAME} does not describe a checkpoint")
    return value


def _check_whole(metadata: Metadata) -> None:
    """Raise UnpicklingError unless the parts of each tensor fill it once."""
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        if not fills([(chunk.offsets, chunk.sizes) for chunk in entry.chunks], entry.size):
            raise pickle.UnpicklingError(
                f"{name} is not whole: its {len(entry.chunks)} parts do not fill its shape {list(entry.size)} once"
            )


def fills(blocks: Sequence[tuple[Sequence[int], Sequence[int]]], shape: Sequence[int]) -> bool:
    """True when blocks (corner, sizes) fill a tensor of `shape` once: no gap, no overlap, nothing beyond it.

    A corner that belongs to an even number of blocks cancels. When what is left are the corners of the whole, each of
    its elements lies in an odd number of blocks, so in at least one; the sum of the sizes then leaves no room for more.
    """
    left = _corners([0] * len(shape), shape)
    elements = 0
    for corner, sizes in blocks:
        if len(corner) != len(shape) or len(sizes) != len(shape) or (0 in sizes and 0 not in shape):
            return False
        left ^= _corners(corner, sizes)
        elements += math.prod(sizes)
    return elements == math.prod(shape) and (not left or elements == 0)


def _corners(corner: Sequence[int], sizes: Sequence[int]) -> set[tuple[int, ...]]:
    return set(itertools.product(*((low, low + size) for low, size in zip(corner, sizes, strict=True))))


def _check_places(metadata: Metadata, checkpoint: Path) -> None:
    """Raise UnpicklingError unless each part of a tensor has a record of its own, large enough, inside of a file."""
    lengths: dict[str, int] = {}
    taken: set[tuple[str, int]] = set()
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        for chunk in entry.chunks:
            place = metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
            if place is None:
                raise pickle.UnpicklingError(f"{name} is not whole: a part of it is in no file")
            if place.relative_path not in lengths:
                path = checkpoint / place.relative_path
                lengths[place.relative_path] = path.stat().st_size if path.is_file() else -1
            if place.offset + place.length > lengths[place.relative_path]:
                raise pickle.UnpicklingError(f"{name} is not whole: {place.relative_path} ends before a part of it")
            if place.length < math.prod(chunk.sizes) * entry.properties.dtype.itemsize:
                raise pickle.UnpicklingError(f"{name} is not whole: a part of it is stored in too few bytes")
            if (place.relative_path, place.offset) in taken:
                raise pickle.UnpicklingError(f"{name} is not whole: a part of it is that of another tensor")
            taken.add((place.relative_path, place.offset))

"""The file that W&B keeps of a run: its own messages in LevelDB's log format, which it offers no reader for."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator
from pathlib import Path

# The file begins with 7 bytes that name the format; they belong to the first block.
_BLOCK, _HEADER = 32768, struct.Struct("<IHB")
_FIRST, _FULL, _LAST = 7, 1, 4
# The end of a run is the last message, or has few behind it.
_LOOKED_AT = 8


def messages(content: bytes) -> Iterator[bytes]:
    """The messages of a .wandb file. One that was being written when its process died or the disk was full is left out.

    Format: https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    position, message = _FIRST, b""
    while position + _HEADER.size <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER.size:
            position += left
            continue
        _, length, kind = _HEADER.unpack_from(content, position)
        position += _HEADER.size
        if position + length > len(content):
            return
        message += content[position : position + length]
        position += length
        if kind in (_FULL, _LAST):
            yield message
            message = b""


def has_ended(file: Path) -> bool:
    """Whether a .wandb file holds the end of its run, which W&B writes last. Raises OSError."""
    from wandb.proto.wandb_internal_pb2 import Record

    last = deque(messages(file.read_bytes()), maxlen=_LOOKED_AT)
    return any(Record.FromString(message).WhichOneof("record_type") == "exit" for message in last)

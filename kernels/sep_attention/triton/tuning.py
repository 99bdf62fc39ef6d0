"""Tile configurations of the kernels: a shipped table, nothing is tuned at run time.

The table was chosen by what the compiler makes of each entry (no spilled registers in half precision, whole
warpgroup products on sm_90, two programs to a multiprocessor where they fit). Among such entries those for half
precision on sm_90 at D = 64 and 128 were chosen by times on an H200 at 8,192 tokens (`benchmarks/attention/tune.py`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

HEAD_SIZES = (32, 64, 80, 96, 128, 256)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
KERNELS = ("forward", "backward_q", "backward_kv")
# Compiler option of every kernel. Triton fuses multiplications with additions by default up to 3.8 and not from 3.9 on:
# without it the results would depend on the version.
FP_FUSION = {"enable_fp_fusion": True}


class Tile(NamedTuple):
    """Tile sizes and launch parameters that a kernel is compiled with.

    Attributes:
        queries, keys: rows of a tile.
        warps, stages: of the program and of its software pipeline.
        registers: most registers a thread may take under the paper's pattern, so that two programs share a
            multiprocessor; None for no limit.
        split: dK and dV come from a launch each, because their sums do not fit the registers together.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    split: bool = False


class ShippedTile(NamedTuple):
    """A line of the table.

    Attributes:
        kernel: one of KERNELS.
        head_size: one of HEAD_SIZES.
        dtype: "bf16", "fp16" or "fp32".
        precision: how products are taken, "half", "tf32" or "ieee".
        architecture: 90 or 80, the compute capability times ten it is compiled for.
        tile: the configuration.
    """

    kernel: str
    head_size: int
    dtype: str
    precision: str
    architecture: int
    tile: Tile


# (architecture, precision, head size): tiles of the three kernels. Entries for 80 fit 99 KiB of shared memory, which
# consumer cards have, and serve every architecture that lacks warpgroup products.
_TABLE: dict[tuple[int, str, int], tuple[Tile, Tile, Tile]] = {
    (90, "half", 32): (Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 2, 128), Tile(64, 64, 4, 2)),
    (90, "half", 64): (Tile(64, 64, 4, 2), Tile(128, 64, 8, 2, 128), Tile(32, 64, 4, 3)),
    (90, "half", 128): (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2, 128), Tile(32, 64, 4, 3)),
    (90, "half", 256): (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2, split=True)),
    (90, "tf32", 32): (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(32, 64, 4, 2)),
    (90, "tf32", 64): (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(32, 64, 4, 2)),
    (90, "tf32", 128): (Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 8, 2)),
    (90, "tf32", 256): (Tile(64, 32, 8, 2), Tile(64, 16, 8, 1), Tile(16, 64, 8, 1, split=True)),
    (80, "half", 32): (Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
    (80, "half", 64): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
    (80, "half", 128): (Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    (80, "half", 256): (Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1, split=True)),
    (80, "tf32", 32): (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2)),
    (80, "tf32", 64): (Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    (80, "tf32", 128): (Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (80, "tf32", 256): (Tile(32, 16, 8, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1, split=True)),
}
# float32 without tensor cores is the same on every architecture.
for _architecture in (90, 80):
    _TABLE[_architecture, "ieee", 32] = (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2))
    _TABLE[_architecture, "ieee", 64] = (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2))
    _TABLE[_architecture, "ieee", 128] = (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2))
    _TABLE[_architecture, "ieee", 256] = (Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1, split=True))
_INTERPRETED = Tile(32, 32, 4, 1)
_forced: dict[str, Tile] = {}


def interpreted() -> bool:
    """True when Triton runs in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def triton_runs_on(device: torch.device) -> bool:
    """True when the kernels run on a device: Triton is installed, and it is a CUDA device or Triton interprets."""
    return TRITON_INSTALLED and (device.type == "cuda" or (device.type == "cpu" and interpreted()))


def padded_head(head_size: int) -> int:
    """D rounded up to a power of two, the width of a tile: 80 and 96 are computed as 128."""
    return 1 << (head_size - 1).bit_length()


def packed_heads(groups: int, tile: Tile) -> int:
    """Number of the G query heads of a key-value head that share a tile of queries.

    The largest power of two that divides G and leaves 32 queries of each head: the fewer queries a tile spans, the
    less of the local band is wasted, until the width of the key tiles decides.
    """
    return max(1, min(groups & -groups, tile.queries // 32))


def dot_precision(dtype: torch.dtype) -> str:
    """Precision of products of a dtype: "half", or for float32 "tf32" or "ieee" as torch's own matrix products."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def architecture_of(capability: tuple[int, int]) -> int:
    """Part of the table that serves a compute capability: 90 or 80. Raises ValueError for one below 8.0."""
    if capability < (8, 0):
        raise ValueError(
            f"backend 'triton' needs compute capability 8.0, this device has {capability[0]}.{capability[1]}"
        )
    return 90 if capability[0] in (9, 10) else 80


@contextmanager
def forced_tiles(**tiles: Tile) -> Iterator[None]:
    """Within the context these tiles, by kernel name, replace the table's: for tuning and tests."""
    before = dict(_forced)
    _forced.update(tiles)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def select_tile(kernel: str, head_size: int, precision: str, device: torch.device) -> Tile:
    """The tile of a kernel on a device. Raises ValueError for a device the table does not serve."""
    if kernel in _forced:
        return _forced[kernel]
    if device.type != "cuda":
        return _INTERPRETED
    architecture = architecture_of(torch.cuda.get_device_capability(device))
    return _TABLE[architecture, precision, padded_head(head_size)][KERNELS.index(kernel)]


def shipped_configurations() -> list[ShippedTile]:
    """Every kernel, head size, dtype, precision and architecture in the table, for the compile gate and tuning."""
    dtypes = {"half": ("bf16", "fp16"), "tf32": ("fp32",), "ieee": ("fp32",)}
    return [
        ShippedTile(kernel, head_size, dtype, precision, architecture, tile)
        for (architecture, precision, padded), tiles in _TABLE.items()
        for head_size in HEAD_SIZES
        if padded_head(head_size) == padded
        for dtype in dtypes[precision]
        for kernel, tile in zip(KERNELS, tiles, strict=True)
    ]

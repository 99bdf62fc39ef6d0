"""The kernels of the decoding cache compiled ahead of time, as lines of the compile gate."""

from __future__ import annotations

import re
from typing import Any

from sep_attention.decode.kernels import (
    VARYING,
    advance_kernel,
    attend_kernel,
    combine_kernel,
    move_kernel,
    write_kernel,
)
from sep_attention.decode.launch import kernel_options
from sep_attention.triton.tuning import FP_FUSION, ShippedTile, Tile
from triton.compiler import ASTSource

from benchmarks.attention.compiled import Resources, Target, compile_source

DECODE = "decode"
FUNCTIONS = {
    "advance": advance_kernel,
    "move": move_kernel,
    "write": write_kernel,
    "attend": attend_kernel,
    "combine": combine_kernel,
}
# Kernels whose threads write where others of them read.
IN_PLACE = ("advance", "move")
CAPACITY = 4096
GROUPS = 4
_INTEGERS = ("LENGTH", "REACH", "REACH_OF_TOKEN", "ARRIVAL", "SOURCE", "MOVED")
_LONG_INTEGERS = ("IDS", "SEEN", "POSITION")
_FLOATS = ("PARTIAL", "PARTIAL_LSE", "TURN_COS", "TURN_SIN")


def decode_targets() -> list[Target]:
    """Every kernel at D = 64 and 128 in bf16, rotary features being half of them, for sm_90 and sm_80."""
    return [
        _target(kernel, head_size, architecture)
        for architecture in (90, 80)
        for head_size in (64, 128)
        for kernel in FUNCTIONS
        if (kernel, head_size) != ("advance", 128)  # it knows no heads
    ]


def _target(kernel: str, head_size: int, architecture: int) -> Target:
    options = _options(kernel, head_size)
    tile = Tile(options.get("M", 1), options.get("N", 1), options["num_warps"], options.get("num_stages", 1))
    return Target(ShippedTile(kernel, head_size, "bf16", "half", architecture, tile), DECODE)


def _options(kernel: str, head_size: int) -> dict[str, Any]:
    options = kernel_options(kernel, CAPACITY, head_size, head_size // 2, GROUPS, "half")
    return options | ({"WHOLE": False} if kernel == "attend" else {})


def compile_decode(target: Target) -> Resources:
    """Compiles a kernel, or finds it in Triton's cache, and reads its resources.

    Raises what Triton raises, and RuntimeError for a kernel that may overwrite what it has yet to read.
    """
    kernel, resources = _compile(target)
    if target.shipped.kernel in IN_PLACE and not reads_before_it_writes(kernel.asm["ptx"]):
        raise RuntimeError("no barrier parts its loads from its stores")
    return resources


def reads_before_it_writes(ptx: str) -> bool:
    """True when all loads stand before all stores with a barrier between them."""
    loads, barriers, stores = (
        [found.start() for found in re.finditer(name, ptx)]
        for name in (r"\bld\.global", r"\bbar\.sync", r"\bst\.global")
    )
    return any(max(loads) < barrier < min(stores) for barrier in barriers)


def _compile(target: Target) -> tuple[Any, Resources]:
    line = target.shipped
    chosen = _options(line.kernel, line.head_size)
    options = {name: chosen.pop(name) for name in ("num_warps", "num_stages", *FP_FUSION) if name in chosen}
    function = FUNCTIONS[line.kernel]
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        signature[name] = "constexpr" if name in chosen else _type(name)
        # Tensors and strides are multiples of 16 bytes or elements.
        if name not in chosen and name not in VARYING and name != "scale":
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs=chosen, attrs=attributes)
    return compile_source(source, line.architecture, options)


def _type(name: str) -> str:
    if name == "scale":
        return "fp32"
    if name in VARYING or name.islower():
        return "i32"
    for kind, names in (("i32", _INTEGERS), ("i64", _LONG_INTEGERS), ("fp32", _FLOATS)):
        if name in names:
            return f"*{kind}"
    return "*bf16"

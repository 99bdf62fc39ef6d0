"""The attention kernels compiled ahead of time, without a GPU, and what the compiler made of them.

The resources are read with the programs that Triton itself uses: ptxas (registers spilled, warnings), cuobjdump
(registers) and nvdisasm (instructions).
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from sep_attention.triton.backward import attention_backward_kv, attention_backward_q
from sep_attention.triton.forward import VARYING, attention_forward
from sep_attention.triton.op import compiler_options, kernel_constants
from sep_attention.triton.tuning import ShippedTile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_manager

FUNCTIONS = {
    "forward": attention_forward,
    "backward_q": attention_backward_q,
    "backward_kv": attention_backward_kv,
}
# What a kernel is compiled for, by the arguments of `kernel_constants`: the paper's pattern, the same with four query
# heads to a key-value head, and everything the masks can hold.
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "gqa4": {"groups": 4},
    "general": {"tiers": 4, "finite": True, "documents": True, "sink": True},
}
# The variants differ in code only where a kernel has code for them.
_WITHOUT_VARIANT = {("backward_kv", "gqa4")}
_SINGLES = {"LSE": "fp32", "STATISTICS": "fp32", "SINK": "fp32", "DSINK": "fp32", "TIER": "u8"}
_PLAN = ("PREFIX", "POSITIONS", "DOCUMENT_START", "DOCUMENT_END")
# Raised when what is read from a compiled kernel changes, so that records in the cache are read anew.
_FORMAT = 3


@dataclass(frozen=True)
class Target:
    """One compilation: a line of the shipped table, a variant, and which launch of a kernel that is split in two."""

    shipped: ShippedTile
    variant: str = "paper"
    part: int = 0

    @property
    def name(self) -> str:
        """The compilation in words, unique among the shipped ones."""
        kernel, head_size, dtype, precision, architecture, _ = self.shipped
        number = {"half": dtype, "tf32": "tf32", "ieee": "fp32"}[precision]
        part = ("", "/dk", "/dv")[self.part]
        return f"{kernel}{part} D{head_size} {number} sm_{architecture} {self.variant}"


@dataclass(frozen=True)
class Resources:
    """Resources of a compiled kernel: registers of a thread, bytes spilled by a thread (the larger of stores and
    loads), bytes of shared memory of a program; counts of instructions; whether ptxas serialised wgmma."""

    registers: int
    spills: int
    shared: int
    wgmma: int
    mma: int
    async_copies: int
    serialized: bool


def targets_of(shipped: ShippedTile, variant: str = "paper") -> list[Target]:
    """The compilations of a line of the table: two where the tile splits dK and dV, none where the kernel has no
    code of its own for the variant."""
    if (shipped.kernel, variant) in _WITHOUT_VARIANT:
        return []
    parts = (1, 2) if shipped.tile.split and shipped.kernel == "backward_kv" else (0,)
    return [Target(shipped, variant, part) for part in parts]


def compile_target(target: Target) -> Resources:
    """Compiles a kernel, or finds it in Triton's cache, and reads its resources. Raises what Triton raises."""
    kernel, head_size, dtype, precision, architecture, tile = target.shipped
    constants = kernel_constants(kernel, head_size, precision, tile, **VARIANTS[target.variant])
    function = FUNCTIONS[kernel]
    chosen = constants[max(0, target.part - 1)]
    signature, attributes = _signature(function.arg_names, dtype, chosen)
    source = ASTSource(function, signature, constexprs=chosen, attrs=attributes)
    _, resources = compile_source(source, architecture, compiler_options(tile, chosen))
    return resources


def compile_source(source: ASTSource, architecture: int, options: dict[str, Any]) -> tuple[Any, Resources]:
    """Compile a source for sm_`architecture` and read its resources, both kept in Triton's cache.

    Returns Triton's kernel and the resources. Raises what Triton raises.
    """
    target = GPUTarget("cuda", architecture, 32)
    kernel = triton.compile(source, target=target, options=options)
    record = get_cache_manager(kernel.hash)
    name = f"resources-{_FORMAT}.json"
    known = record.get_file(name)
    if known:
        return kernel, Resources(**json.loads(Path(known).read_text(encoding="utf8")))
    resources = _inspect(kernel, assembler_log(kernel.asm["ptx"], source, target, options))
    record.put(json.dumps(asdict(resources)), name, binary=False)
    return kernel, resources


def assembler_log(ptx: str, source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> str:
    """Report of ptxas on a kernel: its spills, and warnings such as C7510.

    Triton's own last stage assembles the PTX a second time, so the assembler and its flags are those of the version
    at hand: 3.6 runs `ptxas`, 3.7 and 3.8 add --regAllocOptLevel=2, and 3.9 runs `ptxas-blackwell` for sm_90 as well
    (the older one refuses its PTX).
    """
    backend = make_backend(target)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, backend.parse_options(options), source.language)
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        stages["cubin"](ptx, {})
    return log.getvalue()


def _signature(
    names: list[str], dtype: str, constants: dict[str, Any]
) -> tuple[dict[str, str], dict[tuple[int], list[list[Any]]]]:
    """Type and known divisibility of each argument, as a launch with 16-byte aligned tensors gives them."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in VARYING:
            signature[name] = "i32"
            continue
        if name == "scale":
            signature[name] = "fp32"
            continue
        attributes[(index,)] = [["tt.divisibility", 16]]
        if name.islower():
            signature[name] = "i32"
        else:
            signature[name] = "*" + _SINGLES.get(name, "i32" if name in _PLAN else dtype)
    return signature, attributes


def _inspect(kernel: Any, log: str) -> Resources:
    tools = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _output(tools.cuobjdump.path, "--dump-resource-usage", str(cubin))
        listing = _output(tools.nvdisasm.path, "-c", str(cubin))
    registers = re.search(r"REG:(\d+)", usage)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if registers is None or not spills:
        raise RuntimeError(f"ptxas or cuobjdump answered in a form that is not known here: {log or usage!r}")
    return Resources(
        registers=int(registers[1]),
        spills=max(map(int, spills)),
        shared=int(kernel.metadata.shared),
        wgmma=len(re.findall(r"\bHGMMA", listing)),
        mma=len(re.findall(r"\bHMMA", listing)),
        async_copies=len(re.findall(r"\b(?:LDGSTS|UTMALDG)", listing)),
        serialized=bool(re.search(r"C7510|C7515", log)),
    )


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

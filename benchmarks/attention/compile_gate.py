"""Compiles every shipped kernel without a GPU and holds registers, spills and instructions to a budget.

    python -m benchmarks.attention.compile_gate
    python -m benchmarks.attention.compile_gate --head-sizes 64 128 --dtypes bf16 --architectures 90
    python -m benchmarks.attention.compile_gate --variants decode
    python -m benchmarks.attention.compile_gate --record    # after an intended change of the table, with each Triton

Half precision on sm_90 must use wgmma alone, unserialised, in 227 KiB of shared memory, with no spilled register at
D = 64 and at most 64 bytes at D = 128, under every mask and with every version of Triton; other head sizes have
budgets recorded by version. The kernels of the decoding cache, too narrow for wgmma, must spill nothing and use the
tensor cores they can. Everything else has to compile and is reported. Below the table stands the counted model: pairs
the tiles touch over pairs needed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

# Triton reads this when the kernels are defined, which the next imports do.
os.environ.pop("TRITON_INTERPRET", None)

import benchmarks.attention.require_triton  # noqa: F401 - ends the program where Triton is missing

import triton
from sep_attention.triton.tuning import shipped_configurations

from benchmarks.attention.budgets import Spills, minor_version, read_budget, record_budget
from benchmarks.attention.compiled import VARIANTS, Resources, Target, compile_target, targets_of
from benchmarks.attention.compiled_decode import DECODE, compile_decode, decode_targets
from benchmarks.attention.pairs_model import print_model
from benchmarks.common import exit_with
from sepllm_train.base.errors import UserError

BUDGET_FILE = Path(__file__).resolve().parent / "sm90_budget.json"
# Bytes a thread may spill in half precision on sm_90.
SPILL_BUDGET = {64: 0, 128: 64}
# Most bytes of shared memory a program may have on an H100.
SHARED_LIMIT = 227 * 1024
# Head sizes whose kernels are compiled for all VARIANTS, not for the paper's pattern alone.
VARIANT_HEADS = (64, 128)
COLUMNS = f"{'registers':>9} {'spills':>6} {'KiB':>5} {'wgmma':>5} {'mma':>4} {'async':>5}"


def shipped_targets() -> list[Target]:
    """Every compilation of the gate: the shipped table, the variants of bf16 on sm_90 at VARIANT_HEADS, decoding."""
    targets = []
    for line in shipped_configurations():
        with_variants = (line.architecture, line.dtype) == (90, "bf16") and line.head_size in VARIANT_HEADS
        for variant in VARIANTS if with_variants else ("paper",):
            targets += targets_of(line, variant)
    return targets + decode_targets()


def is_gated(target: Target) -> bool:
    """True when budgets hold for a compilation; the others only have to compile."""
    return (target.shipped.architecture, target.shipped.precision) == (90, "half")


def spill_budget(target: Target, recorded: Spills) -> int:
    """Bytes a thread of a gated kernel may spill; what has no rule and no record may spill none."""
    if target.shipped.head_size in SPILL_BUDGET:
        return SPILL_BUDGET[target.shipped.head_size]
    return recorded.get(target.name, 0)


def violations(target: Target, result: Resources | str, recorded: Spills) -> list[str]:
    """Faults of a compiled kernel, one sentence each; a result in words says why it did not compile."""
    if isinstance(result, str):
        return [f"{target.name} does not compile: {result}"]
    if not is_gated(target):
        return []
    budget = spill_budget(target, recorded)
    if target.variant == DECODE:
        budget = 0
        products = {"uses no tensor cores": target.shipped.kernel == "attend" and not result.mma}
    else:
        products = {
            "uses no wgmma": not result.wgmma,
            f"uses {result.mma} of the slower mma instructions": result.mma > 0,
        }
    checks = products | {
        f"spills {result.spills} bytes of registers, its budget is {budget}": result.spills > budget,
        f"takes {result.shared} bytes of shared memory, the limit is {SHARED_LIMIT}": result.shared > SHARED_LIMIT,
        "has its wgmma serialised by ptxas (C7510 or C7515)": result.serialized,
    }
    return [f"{target.name} {problem}" for problem, holds in checks.items() if holds]


def compile_all(targets: Sequence[Target], jobs: int) -> Iterator[tuple[Target, Resources | str]]:
    """Compiles in `jobs` processes; yields results as they come, with progress on stderr."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        pending = {pool.submit(_try_compile, target): target for target in targets}
        for number, future in enumerate(as_completed(pending), 1):
            target = pending[future]
            if sys.stderr.isatty():
                print(f"\r[{number}/{len(targets)}] {target.name:<48}", end="", file=sys.stderr, flush=True)
            elif number % 10 == 0:
                print(f"[{number}/{len(targets)}]", file=sys.stderr, flush=True)
            yield target, future.result()
    if sys.stderr.isatty():
        print(f"\r{'':<60}\r", end="", file=sys.stderr)


def _try_compile(target: Target) -> Resources | str:
    try:
        return compile_decode(target) if target.variant == DECODE else compile_target(target)
    except Exception as error:  # whatever the compiler raises is the result that is reported
        return " ".join(str(error).split())[:300] or type(error).__name__


def table_line(target: Target, result: Resources | str, problems: Sequence[str]) -> str:
    """A line of the printed table."""
    if isinstance(result, str):
        return f"{target.name:<42} {_tile_label(target):<20} does not compile"
    numbers = f"{result.registers:>9} {result.spills:>6} {result.shared / 1024:>5.0f} {result.wgmma:>5}"
    verdict = "FAILS" if problems else "ok" if is_gated(target) else "reported"
    tile = _tile_label(target)
    return f"{target.name:<42} {tile:<20} {numbers} {result.mma:>4} {result.async_copies:>5} {verdict}"


def _tile_label(target: Target) -> str:
    tile = target.shipped.tile
    limit = "" if tile.registers is None else f" r{tile.registers}"
    return f"{tile.queries}x{tile.keys} w{tile.warps} s{tile.stages}{limit}"


def _record(path: Path, results: Mapping[Target, Resources | str]) -> None:
    spills = {
        target.name: result.spills
        for target, result in results.items()
        if not isinstance(result, str) and is_gated(target) and result.spills > spill_budget(target, {})
    }
    record_budget(path, triton.__version__, spills)
    print(f"wrote {path}, Triton {minor_version(triton.__version__)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-sizes", type=int, nargs="+", help="these alone")
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp16", "fp32"), help="these alone")
    parser.add_argument("--architectures", type=int, nargs="+", choices=(80, 90), help="these alone")
    parser.add_argument("--variants", nargs="+", choices=(*VARIANTS, DECODE), help="these alone")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (%(default)s)")
    parser.add_argument("--budget", type=Path, default=BUDGET_FILE, help="file of recorded spills (%(default)s)")
    parser.add_argument("--record", action="store_true", help="write this Triton's budget anew from what is measured")
    parser.add_argument("--no-pairs", action="store_true", help="without the counted model")
    return parser


def _selected(options: argparse.Namespace) -> list[Target]:
    def wanted(target: Target) -> bool:
        line = target.shipped
        pairs = (
            (options.head_sizes, line.head_size),
            (options.dtypes, line.dtype),
            (options.architectures, line.architecture),
            (options.variants, target.variant),
        )
        return all(chosen is None or value in chosen for chosen, value in pairs)

    return [target for target in shipped_targets() if wanted(target)]


def main() -> int:
    """Compile, print the table and the counted model; 1 when a kernel or the model breaks its bar."""
    options = _parser().parse_args()
    targets = _selected(options)
    if not targets:
        raise UserError("No shipped kernel is of that head size, dtype, architecture and variant.")
    if options.record and len(targets) < len(shipped_targets()):
        raise UserError("--record writes the budget of all kernels: leave out what selects some of them.")
    begin = time.perf_counter()
    results = dict(compile_all(targets, options.jobs))
    if options.record:
        _record(options.budget, results)
    budget = read_budget(options.budget, triton.__version__)
    substitute = ""
    if budget.version != minor_version(triton.__version__):
        substitute = f"no budgets are recorded for Triton {triton.__version__}, those of {budget.version} are used"
    problems = []
    print(f"Triton {triton.__version__}; spills in bytes of a thread, KiB of shared memory of a program")
    if substitute:
        print(f"note: {substitute}")
    print(f"{'kernel':<42} {'tile':<20} {COLUMNS}")
    for target in targets:
        found = violations(target, results[target], budget.spills)
        print(table_line(target, results[target], found))
        problems += found
    print(f"{len(targets)} kernels, {len(problems)} problems, {time.perf_counter() - begin:.0f} s")
    if problems and substitute:
        problems.append(substitute)
    if not options.no_pairs:
        print()
        problems += print_model()
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    exit_with(main)

"""Times candidate tiles on the GPU at hand and writes the fastest into the shipped table.

    python -m benchmarks.attention.tune --minutes 20
    python -m benchmarks.attention.tune --head-sizes 128 --keep-table
    python -m benchmarks.attention.tune --candidates FILE --compile-only    # minutes of compiling, on any machine
    python -m benchmarks.attention.tune --candidates FILE                   # then only what compiled well is timed

Candidates are compiled first; those that spill more than the compile gate allows, or that do without wgmma where the
device has it, are not timed. The score of a tile is the geometric mean, over --lengths, of its time over that of the
tile in the table. Figures go to a file under results/gpu as they come; the table, in tuning.py, changes where a tile is
faster by more than MARGIN, unless other lengths or another window are asked for. Run the compile gate with --record
and the benchmarks afterwards.
"""

from __future__ import annotations

import benchmarks.attention.require_triton  # noqa: F401 - ends the program where Triton is missing

import argparse
import itertools
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from sep_attention import build_plan
from sep_attention.triton import tuning
from sep_attention.triton.tuning import KERNELS, ShippedTile, Tile, forced_tiles, padded_head, select_tile

from benchmarks.attention.baselines import ours
from benchmarks.attention.compile_gate import SPILL_BUDGET, compile_all, violations
from benchmarks.attention.compiled import targets_of
from benchmarks.attention.gpu import Cell, Inputs, make_inputs, outcome
from benchmarks.attention.separator_text import load_separators, text_rows
from benchmarks.attention.timing import Clock, device_named, machine_facts, new_results
from benchmarks.common import exit_with, read_json, write_json, write_text
from sepllm_train.base.errors import UserError

LENGTHS = (2048, 8192)
WINDOW = 128
TOKENS, HIDDEN = 16384, 2048
MARGIN = 0.02
TABLE = Path(tuning.__file__)
# Head size and kernel.
Case = tuple[int, str]


def candidates(kernel: str, architecture: int) -> list[Tile]:
    """Tiles worth compiling for a kernel."""
    rows, keys = ((64, 128), (32, 64, 128)) if kernel != "backward_kv" else ((32, 64, 128), (64, 128))
    # With the limit two programs of eight warps share a multiprocessor.
    shapes = itertools.product(rows, keys, (4, 8), (2, 3, 4), (None, 128))
    tiles = itertools.starmap(Tile, shapes)
    return [tile for tile in tiles if tile.registers is None or (tile.warps == 8 and architecture >= 90)]


def survivors(head_sizes: Sequence[int], architecture: int, jobs: int) -> dict[Case, list[Tile]]:
    """Candidates that compile within the budget of the gate, by head size and kernel."""
    lines = [
        ShippedTile(kernel, head_size, "bf16", "half", architecture, tile)
        for head_size, kernel in itertools.product(head_sizes, KERNELS)
        for tile in candidates(kernel, architecture)
    ]
    targets = [target for line in lines for target in targets_of(line)]
    good = set()
    for target, result in compile_all(targets, jobs):
        most = SPILL_BUDGET.get(target.shipped.head_size, 0)
        if not isinstance(result, str) and result.spills <= most and not violations(target, result, {}):
            good.add(target.shipped)
    found: dict[Case, list[Tile]] = {case: [] for case in itertools.product(head_sizes, KERNELS)}
    for line in lines:
        if line in good:
            found[line.head_size, line.kernel].append(line.tile)
    return found


def kept_survivors(path: Path, head_sizes: Sequence[int], architecture: int) -> dict[Case, list[Tile]]:
    """Tiles that `--compile-only` wrote. Raises UserError for a file that was made for something else."""
    content = read_json(path)
    if content.get("architecture") != architecture or content.get("triton") != triton.__version__:
        raise UserError(
            f"--candidates {path} is of architecture {content.get('architecture')} and Triton "
            f"{content.get('triton')}, here are {architecture} and {triton.__version__}: make it anew."
        )
    found = {
        (entry["head_size"], entry["kernel"]): [Tile(*tile) for tile in entry["tiles"]] for entry in content["kernels"]
    }
    lacking = sorted(set(head_sizes) - {head_size for head_size, _ in found})
    if lacking:
        raise UserError(f"--candidates {path} has no head size {lacking[0]}: make it anew.")
    return found


def keep_survivors(path: Path, found: Mapping[Case, Sequence[Tile]], architecture: int) -> None:
    """Write candidates for `kept_survivors`."""
    kernels = [
        {"head_size": head_size, "kernel": kernel, "tiles": [list(tile) for tile in tiles]}
        for (head_size, kernel), tiles in found.items()
    ]
    write_json(path, {"architecture": architecture, "triton": triton.__version__, "kernels": kernels})


def compile_for_timing(found: Mapping[Case, Sequence[Tile]], jobs: int) -> None:
    """Launch every candidate once in `jobs` processes: Triton's cache then has it, and timing waits for no compiler."""
    work = [(head_size, kernel, tile) for (head_size, kernel), tiles in found.items() for tile in tiles]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        failures = [problem for problem in pool.map(_launch_once, *zip(*work, strict=True)) if problem]
    for problem in failures:
        print(f"warning: {problem}", file=sys.stderr)


def _launch_once(head_size: int, kernel: str, tile: Tile) -> str:
    """Empty, or why a candidate cannot be launched."""
    try:
        device = torch.device("cuda")
        bench = Bench(head_size, device, Clock(device), lengths=LENGTHS[:1], window=WINDOW, tokens=LENGTHS[0])
        with forced_tiles(**{kernel: tile}):
            ((attend, (inputs, *_)),) = bench.cases
            outcome(attend, inputs)
        torch.cuda.synchronize()
    except Exception as error:  # the compiler and the driver raise what they like; timing meets it again
        return " ".join(f"{kernel} D={head_size} {tuple(tile)}: {error}".split())[:300]
    return ""


class Bench:
    """Times one kernel's tiles on real separators at each of `lengths`."""

    def __init__(
        self,
        head_size: int,
        device: torch.device,
        clock: Clock,
        *,
        lengths: Sequence[int],
        window: int,
        tokens: int = TOKENS,
    ) -> None:
        self.clock = clock
        self.cases = []
        text = load_separators()
        for length in lengths:
            batch = max(1, tokens // length)
            plan = build_plan(torch.from_numpy(text_rows(text, length, batch)).to(device))
            inputs = make_inputs(Cell(length, window, head_size, 1, "text"), batch, HIDDEN, device, 2)
            self.cases.append((ours(plan, window), inputs))

    def milliseconds(self, kernel: str, tile: Tile) -> list[float]:
        """Median time of the pass a kernel belongs to, at each length, with this tile."""
        with forced_tiles(**{kernel: tile}):
            return [self._time(kernel, attend, inputs) for attend, inputs in self.cases]

    def _time(self, kernel: str, attend: Any, sets: Sequence[Inputs]) -> float:
        def forward(number: int) -> tuple[torch.Tensor, Inputs]:
            inputs = sets[number % len(sets)]
            return attend(inputs.q, inputs.k, inputs.v), inputs

        def backward(prepared: tuple[torch.Tensor, Inputs]) -> None:
            torch.autograd.grad(prepared[0], prepared[1][:3], prepared[1].upstream)

        if kernel == "forward":
            return self.clock.measure(forward, lambda number: number).median
        return self.clock.measure(backward, forward).median


def score(times: Sequence[float], reference: Sequence[float]) -> float:
    """Geometric mean of the ratios of times to reference times; below 1 is faster."""
    return math.exp(sum(math.log(a / b) for a, b in zip(times, reference, strict=True)) / len(times))


def rewritten(source: str, chosen: Mapping[tuple[int, str, int], Mapping[str, Tile]]) -> str:
    """The source of tuning.py with tiles replaced: (architecture, precision, padded head size) -> kernel -> tile.

    Raises UserError for an entry that does not stand on a line of its own.
    """
    for (architecture, precision, padded), tiles in chosen.items():
        pattern = rf'^(    \({architecture}, "{precision}", {padded}\): )\((.*)\),$'
        found = re.search(pattern, source, re.MULTILINE)
        parts = re.findall(r"Tile\([^)]*\)", found[2]) if found else []
        if found is None or len(parts) != len(KERNELS):
            raise UserError(f"{TABLE} has no line for {architecture, precision, padded}: add the tiles by hand.")
        parts = [
            _literal(tiles[kernel]) if kernel in tiles else part for kernel, part in zip(KERNELS, parts, strict=True)
        ]
        source = f"{source[: found.start()]}{found[1]}({', '.join(parts)}),{source[found.end() :]}"
    return source


def _literal(tile: Tile) -> str:
    numbers = list(map(str, tile[:4])) + ([] if tile.registers is None else [str(tile.registers)])
    return f"Tile({', '.join(numbers + ['split=True'] * tile.split)})"


def tune_kernel(bench: Bench, kernel: str, head_size: int, tiles: Sequence[Tile], deadline: float) -> dict[str, Any]:
    """Times the table's tile and the others until the deadline; scores are relative to the table's."""
    device = bench.clock.device
    current = select_tile(kernel, head_size, "half", device)
    reference = bench.milliseconds(kernel, current)
    timed: list[dict[str, Any]] = [{"tile": list(current), "milliseconds": reference, "score": 1.0}]
    failed = []
    for tile in tiles:
        if time.monotonic() > deadline:
            break
        if tile == current:
            continue
        try:
            times = bench.milliseconds(kernel, tile)
        except Exception as error:  # too little shared memory, say: it is no candidate on this device
            failed.append({"tile": list(tile), "reason": " ".join(str(error).split())[:200]})
            continue
        timed.append({"tile": list(tile), "milliseconds": times, "score": score(times, reference)})
    timed.sort(key=lambda entry: entry["score"])
    found = {"kernel": kernel, "head_size": head_size, "candidates": len(tiles), "timed": timed}
    return found | ({"failed": failed} if failed else {})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=(64, 128), choices=tuning.HEAD_SIZES)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of the sequences")
    parser.add_argument("--window", type=int, default=WINDOW, help="tokens in sight (%(default)s)")
    parser.add_argument("--minutes", type=float, default=20, help="stop timing after this long (%(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers; 0: none ahead of timing"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="figures (default: a name under results/gpu)")
    parser.add_argument("--candidates", type=Path, metavar="FILE", help="tiles that compile well, kept between calls")
    parser.add_argument("--compile-only", action="store_true", help="write --candidates and stop; needs no GPU")
    parser.add_argument("--architecture", type=int, choices=(80, 90), default=90, help="of --compile-only (90)")
    parser.add_argument("--keep-table", action="store_true", help="leave tuning.py as it is")
    return parser


def main() -> int:
    """Tune forward, dQ and dK/dV at each head size, one after another."""
    options = _parser().parse_args()
    if options.compile_only:
        if options.candidates is None:
            raise UserError("--compile-only has nowhere to write: give --candidates FILE.")
        found = survivors(options.head_sizes, options.architecture, max(1, options.jobs))
        keep_survivors(options.candidates, found, options.architecture)
        print(f"{sum(map(len, found.values()))} candidates in {options.candidates}")
        return 0
    device = device_named("cuda")
    architecture = tuning.architecture_of(torch.cuda.get_device_capability(device))
    if options.candidates is None:
        found = survivors(options.head_sizes, architecture, max(1, options.jobs))
    else:
        found = kept_survivors(options.candidates, options.head_sizes, architecture)
    if options.jobs:
        compile_for_timing(found, options.jobs)
    deadline = time.monotonic() + 60 * options.minutes
    clock = Clock(device, seconds=0.05, most=30)
    usual = (tuple(options.lengths), options.window) == (LENGTHS, WINDOW)
    path, results = new_results("tuning", options.output, machine_facts(device))
    results |= {"lengths": list(options.lengths), "window": options.window, "kernels": []}
    chosen: dict[tuple[int, str, int], dict[str, Tile]] = {}
    cases = list(itertools.product(options.head_sizes, KERNELS))
    for number, (head_size, kernel) in enumerate(cases):
        share = max(0, deadline - time.monotonic()) / (len(cases) - number)
        bench = Bench(head_size, device, clock, lengths=options.lengths, window=options.window)
        timed = tune_kernel(bench, kernel, head_size, found[head_size, kernel], time.monotonic() + share)
        results["kernels"].append(timed)
        write_json(path, results)
        best = timed["timed"][0]
        print(f"{kernel} D={head_size}: {best['tile']}, {best['score']:.3f} of the table's time", flush=True)
        if best["score"] < 1 - MARGIN:
            chosen.setdefault((architecture, "half", padded_head(head_size)), {})[kernel] = Tile(*best["tile"])
    if usual and not options.keep_table:
        write_text(TABLE, rewritten(TABLE.read_text(encoding="utf8"), chosen))
        print(f"wrote {TABLE}: run the compile gate with --record")
    return 0


if __name__ == "__main__":
    exit_with(main)

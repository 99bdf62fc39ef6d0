"""Times candidate tiles on the GPU at hand and writes the fastest into the shipped table.

    python kernels/benchmarks/tune.py --minutes 20
    python kernels/benchmarks/tune.py --head-sizes 128 --keep-table

Candidates are compiled first; those that spill more than the compile gate allows, or that do without wgmma where the
device has it, are not timed. The score of a tile is the geometric mean, over LENGTHS, of its time over that of the
tile in the table. Figures go to a file under results/ as they come; the table, in tuning.py, changes where a tile is
faster by more than MARGIN. Run the compile gate with --record and the benchmarks afterwards.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compile_gate import SPILL_BUDGET, compile_all, violations
from compiled import targets_of
from gpu_attention import Cell, Inputs, make_inputs
from records import RESULTS, exit_with, write_json, write_text
from rivals import ours
from sep_attention import build_plan, tuning
from sep_attention.tuning import KERNELS, ShippedTile, Tile, forced_tiles, padded_head, select_tile
from separator_text import load_separators, text_rows
from timing import Clock, machine_facts

from data_prep.errors import UserError

LENGTHS = (2048, 8192)
WINDOW = 128
TOKENS, HIDDEN = 16384, 2048
MARGIN = 0.02
TABLE = Path(tuning.__file__)


def candidates(kernel: str, architecture: int) -> list[Tile]:
    """Tiles worth compiling for a kernel."""
    rows, keys = ((64, 128), (32, 64, 128)) if kernel != "backward_kv" else ((32, 64, 128), (64, 128))
    # With the limit two programs of eight warps share a multiprocessor.
    shapes = itertools.product(rows, keys, (4, 8), (2, 3, 4), (None, 128))
    tiles = itertools.starmap(Tile, shapes)
    return [tile for tile in tiles if tile.registers is None or (tile.warps == 8 and architecture >= 90)]


def survivors(kernel: str, head_size: int, architecture: int, jobs: int) -> list[Tile]:
    """Candidates that compile within the budget of the gate."""
    lines = [
        ShippedTile(kernel, head_size, "bf16", "half", architecture, tile) for tile in candidates(kernel, architecture)
    ]
    targets = [target for line in lines for target in targets_of(line)]
    good = set()
    for target, result in compile_all(targets, jobs):
        most = SPILL_BUDGET.get(head_size, 0)
        if not isinstance(result, str) and result.spills <= most and not violations(target, result, {}):
            good.add(target.shipped.tile)
    return [line.tile for line in lines if line.tile in good]


class Bench:
    """Times one kernel's tiles on real separators at each of LENGTHS."""

    def __init__(self, head_size: int, device: torch.device, clock: Clock) -> None:
        self.clock = clock
        self.cases = []
        text = load_separators()
        for length in LENGTHS:
            batch = TOKENS // length
            plan = build_plan(torch.from_numpy(text_rows(text, length, batch)).to(device))
            inputs = make_inputs(Cell(length, WINDOW, head_size, 1, "text"), batch, HIDDEN, device, 2)
            self.cases.append((ours(plan, WINDOW), inputs))

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
    for tile in tiles:
        if time.monotonic() > deadline:
            break
        if tile != current:
            times = bench.milliseconds(kernel, tile)
            timed.append({"tile": list(tile), "milliseconds": times, "score": score(times, reference)})
    timed.sort(key=lambda entry: entry["score"])
    return {"kernel": kernel, "head_size": head_size, "candidates": len(tiles), "timed": timed}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=(64, 128), choices=tuning.HEAD_SIZES)
    parser.add_argument("--minutes", type=float, default=20, help="stop timing after this long (%(default)s)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="figures (default: a name under results/)")
    parser.add_argument("--keep-table", action="store_true", help="leave tuning.py as it is")
    return parser


def main() -> int:
    """Tune forward, dQ and dK/dV in turn at each head size."""
    options = _parser().parse_args()
    if not torch.cuda.is_available():
        raise UserError("There is no CUDA device here: tuning times the kernels on a GPU.")
    device = torch.device("cuda")
    deadline = time.monotonic() + 60 * options.minutes
    clock = Clock(device, seconds=0.05, most=30)
    architecture = tuning.architecture_of(torch.cuda.get_device_capability(device))
    machine = machine_facts(device)
    path = options.output or RESULTS / f"tuning-{'-'.join(machine['device'].lower().split())}.json"
    results: dict[str, Any] = {"machine": machine, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "kernels": []}
    chosen: dict[tuple[int, str, int], dict[str, Tile]] = {}
    turns = list(itertools.product(options.head_sizes, KERNELS))
    for turn, (head_size, kernel) in enumerate(turns):
        tiles = survivors(kernel, head_size, architecture, options.jobs)
        share = max(0, deadline - time.monotonic()) / (len(turns) - turn)
        found = tune_kernel(Bench(head_size, device, clock), kernel, head_size, tiles, time.monotonic() + share)
        results["kernels"].append(found)
        write_json(path, results)
        best = found["timed"][0]
        print(f"{kernel} D={head_size}: {best['tile']}, {best['score']:.3f} of the table's time", flush=True)
        if best["score"] < 1 - MARGIN:
            chosen.setdefault((architecture, "half", padded_head(head_size)), {})[kernel] = Tile(*best["tile"])
    if not options.keep_table:
        write_text(TABLE, rewritten(TABLE.read_text(encoding="utf8"), chosen))
        print(f"wrote {TABLE}: run the compile gate with --record")
    return 0


if __name__ == "__main__":
    exit_with(main)

"""Times the Triton kernels beside every other attention kernel at hand, in one process on the same tensors.

    python -m benchmarks.attention.gpu --minutes 30
    python -m benchmarks.attention.gpu --lengths 2048 8192 --head-sizes 128 --text PREFIX

Each cell (length, window, head size, query heads per key-value head, separators) is written to a file under
results/gpu when it is done. The most telling cells come first, and a second call resumes where the first one stopped.
Every kernel is checked against ours before it is timed; one that is missing, fails or differs is noted with the reason.
Times are medians of many calls, on rotating inputs and a flushed cache, of forward, backward and both.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sep_attention import AttentionPlan, build_plan
from sep_attention.triton.tuning import KERNELS, TRITON_INSTALLED, dot_precision, select_tile
from torch import Tensor

from benchmarks.attention.baselines import OURS, Attention, Baseline, baselines_of, installed_versions, ours
from benchmarks.attention.pairs_model import needed_of_plan, touched_pairs
from benchmarks.attention.separator_text import load_separators, random_rows, text_rows
from benchmarks.attention.timing import Clock, clock_of, device_named, machine_facts, machine_limits, new_results
from benchmarks.common import NO_TRITON, RESULTS, exit_with, read_json, write_json
from sepllm_train.base.errors import UserError

# Values of the grid, the most important first.
LENGTHS = (2048, 4096, 8192, 16384, 32768, 1024, 512, 65536, 131072)
MAIN_LENGTHS = LENGTHS[:5]
WINDOWS = (128, 64, 256)
HEAD_SIZES = (64, 128)
GROUPS = (1, 4)
SOURCES = ("text", "12%", "8%", "15%")
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-3}


class Cell(NamedTuple):
    """One combination that is timed; `source` is "text" or a density by chance such as "12%"."""

    length: int
    window: int
    head_size: int
    groups: int
    source: str


class Inputs(NamedTuple):
    """q, k, v that require gradients, and the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor


def cells(options: argparse.Namespace) -> list[Cell]:
    """The grid, ordered by how many values of a cell are not the first of their kind, then as the values stand."""
    grid = itertools.product(options.lengths, options.windows, options.head_sizes, options.groups, options.sources)

    def rank(cell: Cell) -> tuple[int, int]:
        odd = (cell.length not in MAIN_LENGTHS) + (cell.window != WINDOWS[0]) + (cell.groups != GROUPS[0])
        return odd + (cell.source not in SOURCES[:2]), options.sources.index(cell.source)

    return sorted(itertools.starmap(Cell, grid), key=rank)


def special_tokens(source: str, length: int, batch: int, text: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """bool [B, S] of a cell. Raises UserError for a text that is too short."""
    if source == "text":
        return text_rows(text, length, batch)
    return random_rows(float(source.rstrip("%")) / 100, length, batch)


def make_inputs(cell: Cell, batch: int, hidden: int, device: torch.device, sets: int) -> list[Inputs]:
    """Sets of tensors, each a [B, heads, S, D] view of [B, S, heads, D]; bf16 on a GPU, fp32 on CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = hidden // cell.head_size
    torch.manual_seed(0)

    def rows(count: int) -> Tensor:
        return torch.randn(batch, cell.length, count, cell.head_size, device=device, dtype=dtype).transpose(1, 2)

    made = []
    for _ in range(sets):
        q, k, v = (rows(count).requires_grad_() for count in (heads, heads // cell.groups, heads // cell.groups))
        made.append(Inputs(q, k, v, rows(heads)))
    return made


def check(attend: Attention, expected: list[Tensor], inputs: Inputs) -> float:
    """Largest relative error of output and gradients. Raises ValueError when it is beyond what rounding explains."""
    worst = 0.0
    names = ("output", "dq", "dk", "dv")
    for name, result, wanted in zip(names, outcome(attend, inputs), expected, strict=True):
        error = float((result.float() - wanted.float()).norm() / wanted.float().norm())
        if not error <= TOLERANCE[inputs.q.dtype]:
            raise ValueError(f"its {name} differs from ours by {error:.1e}")
        worst = max(worst, error)
    return worst


def outcome(attend: Attention, inputs: Inputs) -> list[Tensor]:
    """Output and gradients of q, k and v."""
    out = attend(inputs.q, inputs.k, inputs.v)
    return [out.detach(), *torch.autograd.grad(out, inputs[:3], inputs.upstream)]


def time_kernel(attend: Attention, sets: list[Inputs], clock: Clock) -> dict[str, Any]:
    """Timings of forward, backward and both."""

    def pick(number: int) -> Inputs:
        return sets[number % len(sets)]

    def forward_done(number: int) -> tuple[Tensor, Inputs]:
        inputs = pick(number)
        return attend(inputs.q, inputs.k, inputs.v), inputs

    def backward(prepared: tuple[Tensor, Inputs]) -> None:
        out, inputs = prepared
        torch.autograd.grad(out, inputs[:3], inputs.upstream)

    timings = {
        "forward": clock.measure(lambda inputs: attend(inputs.q, inputs.k, inputs.v), pick),
        "backward": clock.measure(backward, forward_done),
        "both": clock.measure(lambda inputs: outcome(attend, inputs), pick),
    }
    return {name: timing._asdict() for name, timing in timings.items()}


def time_cell(cell: Cell, options: argparse.Namespace, text: NDArray[np.bool_], clock: Clock) -> dict[str, Any]:
    """A row of the results: the cell, its counts of pairs (a head, a sequence) and every kernel's times or reason."""
    device = clock.device
    batch = max(1, options.tokens // cell.length)
    special = special_tokens(cell.source, cell.length, batch, text)
    plan = build_plan(torch.from_numpy(special).to(device))
    sets = make_inputs(cell, batch, options.hidden, device, 4 if cell.length <= 32768 else 2)
    torch._dynamo.reset()  # every cell compiles anew; without this the compiler gives up after eight
    expected = {True: outcome(ours(plan, cell.window), sets[0]), False: outcome(ours(plan, cell.length), sets[0])}
    kernels = {}
    for name, baseline in baselines_of(device).items():
        if options.baselines is None or name in options.baselines or name == OURS:
            kernels[name] = _try_kernel(baseline, plan, cell, sets, expected[baseline.sparse], clock)
    precision = dot_precision(sets[0].q.dtype)
    tiles = {kernel: select_tile(kernel, cell.head_size, precision, device) for kernel in KERNELS}
    touched = np.mean([touched_pairs(row, cell.window, tiles, cell.groups) for row in special], axis=0)
    return {
        **cell._asdict(),
        "batch": batch,
        "heads": options.hidden // cell.head_size,
        "density": float(special.mean()),
        "needed_pairs": needed_of_plan(plan, cell.window),
        "touched_pairs": dict(zip(KERNELS, touched.tolist(), strict=True)),
        "tiles": {kernel: list(tile) for kernel, tile in tiles.items()},
        "kernels": kernels,
    }


def _try_kernel(
    baseline: Baseline, plan: AttentionPlan, cell: Cell, sets: list[Inputs], expected: list[Tensor], clock: Clock
) -> dict[str, Any]:
    """Error and timings of a kernel, or the reason why there are none. Of ours the error is that of a second call."""
    try:
        attend = baseline.make(plan, cell.window)
        error = check(attend, expected, sets[0])
        return {"sparse": baseline.sparse, "error": error, **time_kernel(attend, sets, clock)}
    except Exception as failure:  # a baseline may fail in any way; the table says how
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()
        return {"sparse": baseline.sparse, "reason": _reason(failure)}


def _try_cell(cell: Cell, options: argparse.Namespace, text: NDArray[np.bool_], clock: Clock) -> dict[str, Any]:
    """As `time_cell`; when ours fails, which the others are checked against, a row without other kernels."""
    try:
        return time_cell(cell, options, text, clock)
    except RuntimeError as failure:
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()
        return {**cell._asdict(), "kernels": {OURS: {"sparse": True, "reason": _reason(failure)}}}


def _reason(failure: Exception) -> str:
    return " ".join(f"{type(failure).__name__}: {failure}".split())[:300]


def open_results(options: argparse.Namespace, device: torch.device) -> tuple[Path, dict[str, Any]]:
    """The file to write and what it holds: the one given or found for this machine and these kernels, or a new one.

    Raises UserError for a file given that is of another machine, version or set of kernels.
    """
    machine = {**machine_facts(device), "baselines": installed_versions()}
    settings = {key: getattr(options, key) for key in ("tokens", "hidden", "text", "baselines")}
    identity = {"machine": machine, "settings": settings}
    known = [options.output] if options.output else sorted(RESULTS.glob("attention-*.json"), reverse=True)
    for path in known:
        if path.is_file():
            content = read_json(path)
            if {key: content.get(key) for key in identity} == identity:
                return path, content
            if options.output:
                raise UserError(f"{path} is of another machine, version or setting: name a new file in --output.")
    path, results = new_results("attention", options.output, machine)
    return path, {**results, "settings": settings, "limits": [], "rows": []}


def describe(row: dict[str, Any]) -> str:
    """A cell in one line of progress: milliseconds of forward and backward together."""
    times = [
        f"{name} {result['both']['median']:.3f}" if "both" in result else f"{name} -"
        for name, result in row["kernels"].items()
    ]
    head = f"S={row['length']} n={row['window']} D={row['head_size']} G={row['groups']} {row['source']}"
    return f"{head}: {', '.join(times)} ms"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="stop after this long (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timed calls of a kernel and pass (%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--windows", type=int, nargs="+", default=WINDOWS)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=HEAD_SIZES)
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS, help="query heads per key-value head")
    parser.add_argument("--sources", nargs="+", default=SOURCES, help="text, or densities such as 12%%")
    parser.add_argument("--baselines", nargs="+", metavar="NAME", help="these alone, beside ours")
    parser.add_argument("--text", metavar="PREFIX", help="prepared data set or .npy of tiers (default: what ships)")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a batch (%(default)s)")
    parser.add_argument("--hidden", type=int, default=2048, help="query heads times head size (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="results file (default: a name under results/gpu)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu needs TRITON_INTERPRET=1")
    return parser


def main() -> int:
    """Time the cells of the grid that the results do not hold yet."""
    options = _parser().parse_args()
    device = device_named(options.device)
    if not TRITON_INSTALLED:
        raise UserError(NO_TRITON)
    begin = time.monotonic()
    text = load_separators(options.text)
    clock = clock_of(device, options.seconds)
    path, results = open_results(options, device)
    results["limits"].append(machine_limits(clock))
    print(f"{results['machine']['device']}: {results['limits'][-1]}; writing {path}", flush=True)
    done = {tuple(row[field] for field in Cell._fields) for row in results["rows"]}
    waiting = [cell for cell in cells(options) if cell not in done]
    for number, cell in enumerate(waiting):
        if time.monotonic() - begin > 60 * options.minutes:
            print(f"{options.minutes:g} minutes are over, {len(waiting) - number} cells wait for another call")
            break
        results["rows"].append(_try_cell(cell, options, text, clock))
        write_json(path, results)
        print(describe(results["rows"][-1]), flush=True)
    return 0


if __name__ == "__main__":
    exit_with(main)

"""Times separator attention on CPU against dense causal SDPA, forward and backward.

    python -m benchmarks.attention.cpu
    python -m benchmarks.attention.cpu --lengths 2048 8192 --window 64 --text data/books --json cpu.json

Both share tensors, threads and process, in interleaved rounds, so that a busy moment of the machine affects both; the
table shows medians, and the ratio is the median of the ratios of the rounds. The plan is built outside the timed calls
(one serves all layers of a micro-batch) and timed on its own below the table.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sep_attention import AttentionPlan, attended_pairs, build_plan, sep_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention.timing import machine_facts
from benchmarks.common import exit_with, interleaved, timed, write_json
from sepllm_train.base.errors import UserError

BARS = {1024: 1.3, 2048: 1.8, 4096: 2.5, 8192: 3.5}
DENSITY = 0.12
INITIAL_TOKENS = 3
MASKED_UP_TO = 1024


def separators(length: int, text: str | None) -> Tensor:
    """bool [1, S]: Bernoulli at 12%, or the start of a prepared text (any class of PREFIX.sep.bin counts)."""
    if text is None:
        return torch.rand(1, length, generator=torch.Generator().manual_seed(0)) < DENSITY
    side_car = Path(f"{text}.sep.bin")
    if not side_car.is_file():
        raise UserError(f"{side_car} does not exist: give the prefix of a prepared data set to --text.")
    classes = np.fromfile(side_car, dtype=np.uint8, count=length)
    if len(classes) < length:
        raise UserError(f"{side_car} holds {len(classes)} tokens, {length} are needed.")
    return torch.from_numpy(classes)[None] > 0


def milliseconds(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, one figure a round."""
    seconds = interleaved({name: partial(timed, call) for name, call in calls.items()}, rounds)
    return {name: [1e3 * value for value in values] for name, values in seconds.items()}


def time_length(length: int, options: argparse.Namespace) -> dict[str, float | int]:
    """Medians of one sequence length, B=1, and the exact share of the causal triangle that is attended."""
    shape = (1, options.heads, length, options.head_dimension)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    upstream = torch.randn(shape)
    plan = build_plan(separators(length, options.text), initial_tokens=INITIAL_TOKENS)

    def step(attention: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            q.grad = k.grad = v.grad = None
            attention().backward(upstream)

        return run

    def ours(backend: str) -> Callable[[], None]:
        return step(lambda: sep_attention(q, k, v, plan, window=options.window, backend=backend))

    calls = {"dense": step(lambda: scaled_dot_product_attention(q, k, v, is_causal=True)), "blocked": ours("blocked")}
    if length <= MASKED_UP_TO:
        calls["masked"] = ours("masked")
    times = milliseconds(calls, options.rounds)
    pairs = int(attended_pairs(plan, options.window)[0])
    ratios = [dense / blocked for dense, blocked in zip(times["dense"], times["blocked"], strict=True)]
    result: dict[str, float | int] = {name: statistics.median(values) for name, values in times.items()}
    return result | {
        "length": length,
        "ratio": statistics.median(ratios),
        "share": pairs / (length * (length + 1) // 2),
        "density": float((plan.tier > 0).float().mean()),
    }


def time_plan(length: int, options: argparse.Namespace) -> tuple[float, float]:
    """Median milliseconds of building a plan, and of deriving the blocked backend's layout from it."""
    special = separators(length, options.text)

    def with_layout() -> AttentionPlan:
        from sep_attention.blocked import row_layouts

        plan = build_plan(special, initial_tokens=INITIAL_TOKENS)
        row_layouts(plan, options.window, None)
        return plan

    calls = {"plan": lambda: build_plan(special, initial_tokens=INITIAL_TOKENS), "both": with_layout}
    times = {name: statistics.median(values) for name, values in milliseconds(calls, options.rounds).items()}
    return times["plan"], times["both"] - times["plan"]


def print_row(row: dict[str, float | int]) -> None:
    """One line of the table."""
    length = int(row["length"])
    bar = BARS.get(length)
    verdict = "" if bar is None else f"{bar:.1f}x {'reached' if row['ratio'] >= bar else 'MISSED'}"
    masked = f"{row['masked']:10.1f}" if "masked" in row else f"{'-':>10}"
    print(
        f"{length:>7} {row['density']:>8.1%} {row['share']:>9.1%} {row['dense']:>10.1f} {row['blocked']:>10.1f} "
        f"{masked} {row['ratio']:>6.2f}x  {verdict}",
        flush=True,
    )


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, *BARS])
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dimension", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--text", metavar="PREFIX", help="take the separators of a prepared data set")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"forward + backward, fp32, B=1, H={options.heads}, D={options.head_dimension}, n={options.window}, "
        f"{options.threads} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}; milliseconds"
    )
    print(f"{'S':>7} {'special':>8} {'attended':>9} {'dense':>10} {'blocked':>10} {'masked':>10} {'ratio':>7}  bar")
    rows = []
    for length in options.lengths:
        rows.append(time_length(length, options))
        print_row(rows[-1])
    plans = {length: time_plan(length, options) for length in options.lengths}
    for length, (plan, layout) in plans.items():
        print(f"plan of {length} tokens: {plan:.2f} ms, and {layout:.2f} ms for the block layout (once for all layers)")
    if options.json:
        machine = {**machine_facts(torch.device("cpu")), "cores": os.cpu_count()}
        write_json(options.json, {"machine": machine, "rows": rows, "plans_ms": plans})


if __name__ == "__main__":
    exit_with(main)

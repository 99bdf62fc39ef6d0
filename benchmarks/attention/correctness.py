"""Holds the Triton kernels to a float64 reference on a GPU: errors, determinism, CUDA graphs, recompilation.

    python -m benchmarks.attention.correctness --output DIR
    python -m benchmarks.attention.correctness --output DIR --jobs 12      # compilers are what it waits for

Needs torch, NumPy and Triton alone; with SEPLLM_ANY_VERSION=1 other packages may be missing. Errors are relative to
plain PyTorch's in the same precision: at most twice forward and three times backward. One line of JSON a case goes to
DIR/correctness.jsonl as it is done; the exit code is 1 when a case fails. With TRITON_INTERPRET=1, `--device cpu` tries
a few tiny cases.
"""

from __future__ import annotations

import benchmarks.attention.require_triton  # noqa: F401 - ends the program where Triton is missing

import argparse
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sep_attention import FOREVER, AttentionPlan, build_plan, reference_attention, sep_attention
from sep_attention.triton.backward import attention_backward_kv, attention_backward_q
from sep_attention.triton.forward import attention_forward
from torch import Tensor

from benchmarks.attention.timing import device_named, machine_facts
from benchmarks.common import check_positive, exit_with

FORWARD_LIMIT, BACKWARD_LIMIT = 2.0, 3.0
# Errors below this are rounding of the result itself, whatever the ratio.
FLOOR = {torch.bfloat16: 1e-3, torch.float16: 1e-4, torch.float32: 2e-6}
LAYOUTS = 200


class Case(NamedTuple):
    """Shapes and pattern: B sequences of S tokens, H query heads in groups of G; documents, learned sink, tiers."""

    dtype: torch.dtype
    head_size: int
    length: int
    window: int = 64
    groups: int = 1
    tiers: int = 1
    documents: bool = False
    sink: bool = False

    @property
    def name(self) -> str:
        """The case in words."""
        extras = [f"{self.tiers} tiers"] * (self.tiers > 1) + ["documents"] * self.documents + ["sink"] * self.sink
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join([f"{dtype} D={self.head_size} S={self.length} n={self.window} G={self.groups}", *extras])


def gpu_cases(seed: int = 0) -> Iterator[Case]:
    """Lengths and features at D = 64 and 128, every head size and precision, then random cases without end."""
    for head_size in (64, 128):
        for length, window in ((1, 1), (63, 16), (111, 200), (128, 128), (2048, 128), (4095, 64)):
            yield Case(torch.bfloat16, head_size, length, window, 4)
        yield Case(torch.bfloat16, head_size, 1000, tiers=4)
        yield Case(torch.bfloat16, head_size, 1000, documents=True)
        yield Case(torch.bfloat16, head_size, 1000, sink=True)
        yield Case(torch.bfloat16, head_size, 1500, groups=4, tiers=3, documents=True, sink=True)
    for dtype, head_size in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), (64, 128, 32, 80, 96, 256)
    ):
        yield Case(dtype, head_size, 777)
    chance = random.Random(seed)
    while True:
        # Few kinds, because each compiles anew; the lengths and windows do not.
        general = chance.random() < 0.3
        yield Case(
            torch.bfloat16,
            chance.choice((64, 128)),
            chance.randrange(1, 3000),
            chance.choice((1, 17, 64, 128, 256)),
            chance.choice((1, 4)),
            3 if general else 1,
            general,
            general,
        )


def interpreter_cases() -> Iterator[Case]:
    """A few that the interpreter can do in seconds; it cannot multiply bf16."""
    yield Case(torch.float32, 32, 63, 16)
    yield Case(torch.float32, 80, 41, 9, 2, 2, True, True)


class Problem(NamedTuple):
    """Tensors of a case: q [B, H, S, D], k and v [B, H / G, S, D] as views of [S, B, heads, D]."""

    tensors: list[Tensor]
    plan: AttentionPlan
    arguments: dict[str, Any]
    upstream: Tensor


def make_problem(case: Case, device: torch.device, seed: int) -> Problem:
    """Random tensors, separators at 12% and horizons."""
    generator = torch.Generator().manual_seed(seed)
    heads = 2 if device.type == "cpu" else 12 if case.length < 3000 else 4
    heads = max(1, heads // case.groups) * case.groups
    batch = 1 if device.type == "cpu" else 2

    def rows(count: int) -> Tensor:
        values = torch.randn(case.length, batch, count, case.head_size, generator=generator)
        return values.to(device, case.dtype).permute(1, 2, 0, 3).requires_grad_()

    shape = (batch, case.length)
    numbers = torch.randint(1, case.tiers + 1, shape, generator=generator)
    tier = torch.where(torch.rand(shape, generator=generator) < 0.12, numbers, 0).to(torch.uint8)
    start = None
    if case.documents:
        position = torch.arange(case.length).expand(shape)
        first = (torch.rand(shape, generator=generator) < 0.01) | (position == 0)
        start = torch.where(first, position, 0).cummax(1).values.to(device)
    plan = build_plan(tier.to(device), initial_tokens=3, document_start=start, num_tiers=case.tiers)
    horizons = [FOREVER, 500, 200, 100][: case.tiers]
    tensors = [rows(heads), rows(heads // case.groups), rows(heads // case.groups)]
    if case.sink:
        tensors.append(torch.randn(heads, generator=generator).to(device).requires_grad_())
    upstream = torch.randn(tensors[0].shape, generator=generator).to(device, case.dtype)
    return Problem(tensors, plan, {"window": case.window, "horizons": horizons}, upstream)


def outcome(attend: Callable[..., Tensor], problem: Problem, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and gradients; in another dtype when one is given."""
    leaves = [
        tensor if dtype is None else tensor.detach().to(dtype if number < 3 else torch.float64).requires_grad_()
        for number, tensor in enumerate(problem.tensors)
    ]
    sink = leaves[3] if len(leaves) == 4 else None
    out = attend(*leaves[:3], problem.plan, sink=sink, **problem.arguments)
    return [out.detach(), *torch.autograd.grad(out, leaves, problem.upstream.to(out.dtype))]


def triton(*tensors: Any, **arguments: Any) -> Tensor:
    """The Triton backend."""
    return sep_attention(*tensors, **arguments, backend="triton")


def run_case(case: Case, device: torch.device, seed: int) -> dict[str, Any]:
    """Errors of output and gradients, relative to plain PyTorch's, and whether a second run gave the same bits."""
    problem = make_problem(case, device, seed)
    exact = outcome(reference_attention, problem, torch.float64)
    plain = outcome(reference_attention, problem, case.dtype)
    ours, again = outcome(triton, problem), outcome(triton, problem)
    errors, ratios, failures = {}, {}, []
    names = ("out", "dq", "dk", "dv", "dsink")[: len(exact)]
    for name, truth, rough, result, second in zip(names, exact, plain, ours, again, strict=True):
        # A gradient that is zero but for rounding (one key in sight) is held to the size of what it is summed from.
        scale = truth.norm().clamp(min=1e-2 * truth.numel() ** 0.5)
        error, usual = (float((x.double() - truth).norm() / scale) for x in (result, rough))
        errors[name], ratios[name] = error, error / max(usual, FLOOR[case.dtype])
        if not ratios[name] <= (FORWARD_LIMIT if name == "out" else BACKWARD_LIMIT):
            failures.append(f"{name} is off by {error:.2e}, plain PyTorch by {usual:.2e}")
        if not torch.equal(result, second):
            failures.append(f"{name} differs between two runs")
    return {"errors": errors, "ratios": ratios, "failures": failures}


def graph_case(device: torch.device) -> dict[str, Any]:
    """Forward and backward captured in a CUDA graph and replayed on other values: the bits of a plain call."""
    case = Case(torch.bfloat16, 64, 1000)
    problem, other = make_problem(case, device, 0), make_problem(case, device, 1)
    problem = problem._replace(plan=other.plan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outcome(triton, problem)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outcome(triton, problem)
    with torch.no_grad():
        for tensor, values in zip(problem.tensors, other.tensors, strict=True):
            tensor.copy_(values)
        problem.upstream.copy_(other.upstream)
    graph.replay()
    same = all(map(torch.equal, captured, outcome(triton, other)))
    return {"failures": [] if same else ["replay differs from a plain call"]}


def compiled_kernels() -> int:
    """Number of variants of the kernels that are compiled in this process."""
    kernels = (attention_forward, attention_backward_q, attention_backward_kv)
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def recompilation_case(device: torch.device) -> dict[str, Any]:
    """Layouts of random lengths, windows and separators: one compilation serves them all."""
    chance = random.Random(0)
    counts = []
    for seed in range(LAYOUTS):
        case = Case(torch.bfloat16, 64, chance.randrange(1, 2000), chance.randrange(1, 300))
        outcome(triton, make_problem(case, device, seed))
        counts.append(compiled_kernels())
    new = counts[-1] - counts[0]
    failures = [f"{new} kernels were compiled after the first of {LAYOUTS} layouts"] if new else []
    return {"failures": failures}


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a check; one that raises has failed, and is not the end of the others."""
    try:
        return run()
    except Exception as error:
        return {"failures": [f"{type(error).__name__}: {error}"[:500]]}


def check_cases(runs: Sequence[tuple[str, Callable[[], dict[str, Any]]]], path: Path, minutes: float) -> bool:
    """Run cases until the time is over, each a line of `path`; whether all that were run passed."""
    deadline = time.monotonic() + 60 * minutes
    failed = done = 0
    with path.open("w", encoding="utf8") as stream:
        for name, run in runs:
            if time.monotonic() > deadline:
                print(f"{minutes:g} minutes are over, {len(runs) - done} cases were not run")
                break
            result = {"case": name, **attempt(run)}
            failures = result["failures"]
            stream.write(json.dumps(result) + "\n")
            stream.flush()
            done, failed = done + 1, failed + bool(failures)
            print(f"{'FAILED' if failures else 'ok'}: {name} {'; '.join(failures)}", flush=True)
    print(f"{done} cases, {failed} failed")
    return not failed


def check_in_parts(options: argparse.Namespace) -> bool:
    """Deal the cases to `options.jobs` processes that share the device; whether all that were run passed."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.attention.correctness",
        "--output",
        str(options.output),
        "--device",
        options.device,
    ]
    command += ["--minutes", str(options.minutes), "--cases", str(options.cases), "--jobs", str(options.jobs)]
    parts = [subprocess.Popen([*command, "--part", str(part)]) for part in range(options.jobs)]
    codes = [part.wait() for part in parts]
    with (options.output / "correctness.jsonl").open("a", encoding="utf8") as stream:
        for part in range(options.jobs):
            path = options.output / f"correctness-{part}.jsonl"
            if path.exists():
                stream.write(path.read_text(encoding="utf8"))
                path.unlink()
    return not any(codes)


def main() -> int:
    """Run cases until the time is over; 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of correctness.jsonl")
    parser.add_argument("--minutes", type=float, default=6, help="stop after this long (%(default)s)")
    parser.add_argument("--cases", type=int, default=250, help="most cases (%(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--jobs", type=int, default=1, help="processes that the cases are dealt to (%(default)s)")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    check_positive(options, "jobs")
    device = device_named(options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "correctness.jsonl"
    if options.part is None:
        path.write_text(json.dumps({"machine": machine_facts(device)}) + "\n", encoding="utf8")
        return 0 if check_in_parts(options) else 1
    on_gpu = device.type == "cuda"
    cases = itertools.islice(gpu_cases() if on_gpu else interpreter_cases(), options.cases)
    runs: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    if on_gpu:
        runs = [("CUDA graph", lambda: graph_case(device)), ("layouts", lambda: recompilation_case(device))]
    runs += [(case.name, partial(run_case, case, device, number)) for number, case in enumerate(cases)]
    mine = runs[options.part :: options.jobs]
    return 0 if check_cases(mine, options.output / f"correctness-{options.part}.jsonl", options.minutes) else 1


if __name__ == "__main__":
    exit_with(main)

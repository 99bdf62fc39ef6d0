"""Times decoding with the separator cache on a GPU: what compaction costs a token, and attention beside a full cache.

    python -m benchmarks.attention.decode
    python -m benchmarks.attention.decode --models llama-8b --batches 1 64 --capacities 800 --output FILE

A step is the cache's part of a token: the bookkeeping, and write and attention of all layers, in a CUDA graph, rows
being half way between compactions. The share of compaction is that of a mean token when all rows compact at once.
Attention of one layer is set against the library's on as many keys as the whole context. All times are medians of
many calls on a flushed cache; ratios are of times of one run. Each cell is written to a file under results/gpu
when it is done.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sep_attention import FOREVER, DecodeCache, advance, attend, write
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention.timing import Clock, clock_of, device_named, machine_facts, machine_limits, new_results
from benchmarks.common import exit_with, write_json

DENSITY = 0.12  # of separators
VOCABULARY = 1000
ROTARY_BASE = 10000.0


class Model(NamedTuple):
    """Sizes of a model's attention."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    rotary: int


MODELS = {
    "pythia-160m": Model(12, 12, 12, 64, 16),
    "llama-8b": Model(32, 32, 8, 128, 128),
    "tiny": Model(2, 4, 2, 16, 8),
}
# Trials of the program on a CPU.
TINY = {"models": ["tiny"], "batches": [2], "capacities": [40], "context": 256}


class Bench:
    """A cache whose rows can be set to a length, and the calls that are timed."""

    def __init__(self, model: Model, batch: int, capacity: int, device: torch.device) -> None:
        self.model, self.device = model, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        # The proportions of the paper's streaming runs: 4 + 64 + 256 of 800.
        pairs = torch.arange(0, model.rotary, 2) / model.rotary
        self.cache = DecodeCache.allocate(
            model.layers,
            batch,
            model.heads,
            model.kv_heads,
            capacity,
            model.head_size,
            initial=4,
            separators=capacity * 64 // 800,
            window=capacity * 256 // 800,
            dtype=self.dtype,
            device=device,
            inverse_frequencies=ROTARY_BASE**-pairs,
        )
        for stored in (self.cache.keys, self.cache.values, self.cache.arrived):
            if stored is not None:
                stored.normal_()
        self.query = self.draw(batch, model.heads, model.head_size)
        self.key, self.value = self.draw(2, batch, model.kv_heads, model.head_size)
        self.out = torch.empty_like(self.query)
        self.ids = torch.randint(VOCABULARY, (batch,), device=device)
        self.reach_of_token = (torch.arange(VOCABULARY, device=device) < DENSITY * VOCABULARY).int() * FOREVER
        self.slots = torch.arange(capacity, device=device)
        self.reach = self.reach_of_token[torch.randint(VOCABULARY, (batch, capacity), device=device)]
        self.lengths = {
            name: torch.full_like(self.cache.length, length)
            for name, length in (("mean", (self.kept + capacity) // 2), ("full", capacity))
        }

    def draw(self, *shape: int) -> Tensor:
        """Random numbers in the dtype of the cache."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    @property
    def kept(self) -> int:
        """Keys of a row after compaction, of a text with enough separators."""
        return self.cache.initial + self.cache.separators + self.cache.window - 1

    def set_length(self, name: str) -> None:
        """Rows of the mean length or full ones, as if nothing had been moved yet."""
        self.cache.length.copy_(self.lengths[name])
        self.cache.seen.copy_(self.lengths[name])
        self.cache.reach.copy_(self.reach)
        self.cache.position.copy_(self.slots)
        self.cache.arrival.copy_(self.slots)

    def advance(self) -> None:
        """The bookkeeping of a token."""
        advance(self.cache, self.ids, self.reach_of_token)

    def attend(self) -> None:
        """The attention of the first layer."""
        attend(self.cache, 0, self.query, self.model.head_size**-0.5, self.out)

    def step(self) -> None:
        """The cache's part of a token."""
        self.advance()
        for layer in range(self.model.layers):
            write(self.cache, layer, self.key, self.value)
            attend(self.cache, layer, self.query, self.model.head_size**-0.5, self.out)

    def full_attention(self, context: int) -> Callable[[], Tensor]:
        """The library's attention to `context` keys of a layer, in the best of its kernels that it picks itself."""
        batch, heads, width = self.query.shape
        keys, values = (self.draw(batch, self.model.kv_heads, context, width) for _ in range(2))
        query, grouped = self.query[:, :, None], heads != self.model.kv_heads
        return lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=grouped)


def graphed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call as a CUDA graph; on a CPU itself."""
    if device.type != "cuda":
        return call
    call()  # compiles
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def time_cell(name: str, batch: int, capacity: int, context: int, clock: Clock) -> dict[str, Any]:
    """A row of the results: sizes, timings in milliseconds, and the two ratios."""
    bench = Bench(MODELS[name], batch, capacity, clock.device)

    def measure(call: Callable[[], object], length: str) -> dict[str, Any]:
        bench.set_length(length)
        run = graphed(call, clock.device)
        return clock.measure(lambda _: run(), lambda _: bench.set_length(length))._asdict()

    times = {
        "advance": measure(bench.advance, "mean"),
        "compaction": measure(bench.advance, "full"),
        "step": measure(bench.step, "mean"),
        "attend": measure(bench.attend, "mean"),
        "full_attention": measure(bench.full_attention(context), "mean"),
    }
    medians = {key: value["median"] for key, value in times.items()}
    every = capacity - bench.kept
    extra = max(0.0, medians["compaction"] - medians["advance"]) / every
    return {
        "model": name,
        "batch": batch,
        "capacity": capacity,
        "context": context,
        "mean_length": int(bench.lengths["mean"][0]),
        "tokens_between_compactions": every,
        "times": times,
        "compaction_share": extra / (medians["step"] + extra),
        "full_over_attend": medians["full_attention"] / medians["attend"],
    }


def describe(row: dict[str, Any]) -> str:
    """A cell in one line."""
    micro = {name: 1e3 * timing["median"] for name, timing in row["times"].items()}
    return (
        f"{row['model']} B={row['batch']} C={row['capacity']}: step {micro['step']:.1f} us, compaction "
        f"{micro['compaction']:.1f} us every {row['tokens_between_compactions']} tokens, {row['compaction_share']:.2%} "
        f"of a token; attention {micro['attend']:.1f} us, to {row['context']} keys {micro['full_attention']:.1f} us, "
        f"{row['full_over_attend']:.1f}x"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["pythia-160m", "llama-8b"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--capacities", type=int, nargs="+", default=[800, 4096])
    parser.add_argument("--context", type=int, default=65536, help="keys of full attention (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timed calls of each kind (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="results file (default: a name under results/gpu)")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries a tiny model in plain torch"
    )
    return parser


def main() -> int:
    """Time the cells and write them as they are done."""
    options = _parser().parse_args()
    device = device_named(options.device)
    if device.type != "cuda":
        vars(options).update(TINY)
    clock = clock_of(device, options.seconds)
    path, results = new_results("decode", options.output, machine_facts(device))
    results |= {"limits": machine_limits(clock), "rows": []}
    print(f"{results['machine']['device']}: {results['limits']}; writing {path}", flush=True)
    for name, batch, capacity in itertools.product(options.models, options.batches, options.capacities):
        results["rows"].append(time_cell(name, batch, capacity, options.context, clock))
        write_json(path, results)
        print(describe(results["rows"][-1]), flush=True)
    return 0


if __name__ == "__main__":
    exit_with(main)

"""Tokens per second of generation with the separator cache, beside full attention to a long context, in one run.

python -m benchmarks.decode                                                          # 14M, a CPU
python -m benchmarks.decode --model pythia160m --device cuda --mode graph --context 65536 --tokens 1048576

The model has random weights. Full attention is given keys and values of `--context` tokens and then decodes: once as
transformers does (DynamicCache, SDPA), once by the same Decoder in slots that are never dropped; the faster one counts.
They are timed in interleaved rounds. Then the cache decodes `--tokens` tokens alone: seconds per token at powers of two
show whether it stays as fast.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import check_positive, exit_with, interleaved, write_json
from sepllm_train.base.console import quantity, say
from sepllm_train.base.errors import UserError
from sepllm_train.config.load import configuration_of

DENSITY = 0.12
BAR_RATIO = 3.0
BAR_FLAT = 0.05
FULL_STEPS = 64


def main() -> None:
    """Print the ratio and the seconds per token along the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pythia14m", help="a model of configs/model (pythia14m)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--mode", choices=("eager", "compile", "graph"), default="eager")
    parser.add_argument("--context", type=int, default=8192, help="tokens that full attention attends to (8192)")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of the long run (16384)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which the median counts (5)")
    for name, value in (("initial", 4), ("separators", 64), ("window", 256), ("capacity", 800)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"of the cache ({value})")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures there as JSON")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {options.device}: there is no GPU here; use cpu.")
    check_positive(options, "rounds")
    if min(options.context, options.tokens) < 1024:
        raise UserError("--context and --tokens must be at least 1024.")
    with torch.no_grad():
        figures = measure(options)
    if options.output is not None:
        write_json(options.output, figures)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of both parts, printed as they come."""
    from sepllm_train.training.run_folder import environment

    bench = Bench(options)
    sides: dict[str, Callable[[int], float]] = {
        "sep": bench.sep(),
        "full, DynamicCache": bench.full_of_transformers(),
        "full, same decoder": bench.full_by_the_decoder(),
    }
    steps = {name: bench.count if name == "sep" else FULL_STEPS for name in sides}
    times = interleaved({name: partial(side, steps[name]) for name, side in sides.items()}, options.rounds)
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, seconds in medians.items():
        say(f"{name}: {1e3 * seconds:.3f} ms a step, {options.batch / seconds:,.0f} tokens/s")
    ratio = min(seconds for name, seconds in medians.items() if name != "sep") / medians["sep"]
    verdict = "met" if ratio >= BAR_RATIO else "missed"
    say(
        f"sep over full at {quantity(options.context)} tokens: {ratio:.2f}x (at 64K on a GPU {BAR_RATIO:g}x: {verdict})"
    )
    del sides["full, same decoder"], sides["full, DynamicCache"]
    points = along_the_way(sides["sep"], options.tokens)
    slowest = max(seconds for _, seconds in points) / points[0][1] - 1
    say(f"slowest point {100 * slowest:+.1f}% of the first (bar {100 * BAR_FLAT:g}%)")
    return {
        "model": options.model,
        "mode": options.mode,
        "context": options.context,
        "seconds_per_step": medians,
        "ratio": ratio,
        "points": points,
        "machine": environment(),
    }


def along_the_way(side: Callable[[int], float], tokens: int) -> list[tuple[int, float]]:
    """(tokens so far, median seconds per step of the eight parts before) at powers of two from 1,024 on."""
    points, seen, mark = [], 0, 1024
    while mark <= tokens:
        parts = []
        while seen < mark:
            part = min(128, mark - seen)
            parts.append(side(part))
            seen += part
        points.append((mark, statistics.median(parts[-8:])))
        say(f"{quantity(mark)} tokens: {1e3 * points[-1][1]:.3f} ms a step")
        mark *= 2
    return points


class Bench:
    """A model and the sides that are timed; a side takes a number of steps and gives the seconds per step."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM

        from sepllm_train.hf.architecture import to_theirs

        self.options, self.device = options, torch.device(options.device)
        dtype = options.dtype or ("bf16" if self.device.type == "cuda" else "fp32")
        config = configuration_of([f"model={options.model}"])
        # Steps of a round with the cache, as many as from one compaction to the next; the other sides' are all alike.
        self.count = max(64, options.capacity - options.initial - options.separators - options.window + 1)
        self.room = options.context + (options.rounds + 1) * FULL_STEPS
        config.data.sequence_length = max(self.room, options.capacity)
        self.vocabulary = config.model.vocabulary or 50304
        torch.manual_seed(0)
        theirs = to_theirs(config, self.vocabulary, 0)
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self.model = AutoModelForCausalLM.from_config(theirs, attn_implementation="sdpa").to(self.device, kind).eval()
        generator = torch.Generator().manual_seed(1)
        self.separators = torch.randperm(self.vocabulary, generator=generator)[: int(DENSITY * self.vocabulary)]

    def ids(self, length: int) -> Tensor:
        """Random tokens, i64 [B, length]."""
        return torch.randint(self.vocabulary, (self.options.batch, length), device=self.device)

    def sep(self) -> Callable[[int], float]:
        """The separator cache behind a prompt that has filled it."""
        return self._decoder(self.options.capacity, "cache", 2 * self.options.capacity)

    def full_by_the_decoder(self) -> Callable[[int], float]:
        """The same code with slots for all of the context."""
        side = self._decoder(self.room, "training", 128)
        self.fill(self.last.cache.slots)
        return side

    def fill(self, slots: Any) -> None:
        """As if the context had been read: random keys and values."""
        context = self.options.context
        for held in (slots.keys, slots.values):
            held[:, :, :, :context].normal_()
        slots.length.fill_(context)
        slots.seen.fill_(context)

    def _decoder(self, capacity: int, positions: str, prompt: int) -> Callable[[int], float]:
        from sepllm_train.hf import Decoder, SepCache, cache_argument

        sizes = {name: getattr(self.options, name) for name in ("initial", "separators", "window")}
        cache = SepCache(
            self.model, **sizes, capacity=capacity, separator_ids=self.separators.tolist(), positions=positions
        )
        self.model(input_ids=self.ids(prompt), **{cache_argument(self.model): cache})
        decoder = self.last = Decoder(self.model, cache, mode=self.options.mode)
        return self._timed(lambda ids: decoder.step(ids[:, 0]).argmax(-1)[:, None])

    def full_of_transformers(self) -> Callable[[int], float]:
        """DynamicCache with random keys and values of the context."""
        from transformers import DynamicCache

        from sepllm_train.hf import cache_argument

        config, options = self.model.config, self.options
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        shape = (options.batch, heads, options.context, config.hidden_size // config.num_attention_heads)
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            keys, values = (torch.randn(shape, device=self.device, dtype=self.model.dtype) for _ in range(2))
            cache.update(keys, values, layer)
        name = cache_argument(self.model)

        def step(ids: Tensor) -> Tensor:
            logits = self.model(input_ids=ids, **{name: cache}).logits
            cache.crop(-1)
            return logits[:, -1].argmax(-1)[:, None]

        return self._timed(step)

    def _timed(self, step: Callable[[Tensor], Tensor]) -> Callable[[int], float]:
        state = [self.ids(1)]

        def run(count: int) -> float:
            self._wait()
            begin = time.perf_counter()
            for _ in range(count):
                state[0] = step(state[0])
            self._wait()
            return (time.perf_counter() - begin) / count

        return run

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


if __name__ == "__main__":
    exit_with(main)

"""Counts the (query, key) pairs whose scores the kernels compute, beside those that the mask needs.

    python -m benchmarks.attention.pairs_model [--text PREFIX]

Touched pairs follow the loop bounds of the kernels tile by tile; needed pairs are counted one by one. Speed-ups are
what the counts say if every pair cost the same in every kernel: dense attention takes 4 D operations a pair forward
and 10 D backward in one fused kernel, ours 4 D, 6 D (dQ) and 8 D (dK and dV). Nothing here is a measurement of speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sep_attention import AttentionPlan, attended_pairs
from sep_attention.triton.tuning import KERNELS, Tile, packed_heads, shipped_configurations

from benchmarks.attention.separator_text import load_separators, random_rows, text_rows
from benchmarks.common import exit_with

LENGTHS = (2048, 8192, 32768)
WINDOWS = (128, 64)
HEAD_SIZES = (64, 128)
# Most touched pairs per needed one, at a window of 128.
BARS = {2048: 1.65, 8192: 1.27, 32768: 1.1}
BAR_WINDOW = 128
DENSITY = 0.12
# Multiples of D: operations per touched pair in each kernel, and in a fused dense kernel forward and in all.
OPERATIONS = {"forward": 4, "backward_q": 6, "backward_kv": 8}
DENSE_FORWARD, DENSE_TOTAL = 4, 14
DENSE_TILE = 128
_TOKENS = 65536


class Touched(NamedTuple):
    """Pairs of one query head whose scores each kernel computes."""

    forward: int
    backward_q: int
    backward_kv: int

    @property
    def mean(self) -> float:
        """Weighted by the operations that a pair costs in each kernel."""
        return self.operations / sum(OPERATIONS.values())

    @property
    def operations(self) -> int:
        """Operations of forward and backward, in multiples of D."""
        return sum(weight * pairs for weight, pairs in zip(OPERATIONS.values(), self, strict=True))


def shipped_tiles(head_size: int, architecture: int = 90, dtype: str = "bf16") -> dict[str, Tile]:
    """Tiles of the three kernels in the shipped table."""
    return {
        line.kernel: line.tile
        for line in shipped_configurations()
        if (line.head_size, line.architecture, line.dtype) == (head_size, architecture, dtype)
    }


def touched_pairs(special: NDArray[np.bool_], window: int, tiles: dict[str, Tile], groups: int = 1) -> Touched:
    """Touched pairs of a sequence [S] under the paper's pattern, per query head; `groups` query heads share keys.

    The bounds are those of `attention_forward` (dQ has the same) and `attention_backward_kv`.
    """
    forward, backward_q, backward_kv = (tiles[kernel] for kernel in KERNELS)
    return Touched(
        _touched_by_queries(special, window, forward, groups),
        _touched_by_queries(special, window, backward_q, groups),
        _touched_by_keys(special, window, backward_kv),
    )


def _touched_by_queries(special: NDArray[np.bool_], window: int, tile: Tile, groups: int) -> int:
    length = len(special)
    queries = tile.queries // packed_heads(groups, tile)
    prefix = np.concatenate(([0], np.cumsum(special)))
    first = np.arange(0, length, queries)
    last = np.minimum(first + queries, length) - 1
    local = np.maximum(first - window + 1, 0) // 16 * 16
    key_tiles = -(-prefix[local] // tile.keys) + -(-(last + 1 - local) // tile.keys)
    return int(key_tiles.sum()) * tile.keys * queries


def _touched_by_keys(special: NDArray[np.bool_], window: int, tile: Tile) -> int:
    length = len(special)
    window = min(window, length)
    # Special keys are read apart where they are in sight for longer than the window.
    positions = np.flatnonzero(special) if window < length else np.array([], dtype=int)
    first_keys = positions[:: tile.keys]
    blocks = -(-(length - first_keys // tile.queries * tile.queries) // tile.queries)
    local = np.arange(0, length, tile.keys)
    end = np.minimum(np.minimum(local + tile.keys, length) - 1 + window, length)
    local_blocks = -(-(end - local // tile.queries * tile.queries) // tile.queries)
    return int(blocks.sum() + local_blocks.sum()) * tile.queries * tile.keys


def needed_pairs(special: NDArray[np.bool_], window: int) -> int:
    """Visible pairs of a sequence [S], one by one: j <= i and (special[j] or i - j < window)."""
    length, count = len(special), 0
    keys = np.arange(length, dtype=np.int32)
    for first in range(0, length, 256):
        query = keys[first : first + 256, None]
        near = keys[: first + 256]
        visible = query - near < window
        visible |= special[: first + 256]
        visible &= query >= near
        count += int(np.count_nonzero(visible))
    return count


def needed_of_plan(plan: AttentionPlan, window: int) -> float:
    """Visible pairs of a sequence of a plan, the mean of its sequences, from its prefix counts."""
    return float(attended_pairs(plan, window).double().mean())


def dense_touched(length: int) -> int:
    """Pairs that dense causal attention computes in tiles of 128 by 128."""
    blocks = -(-length // DENSE_TILE)
    return DENSE_TILE * DENSE_TILE * blocks * (blocks + 1) // 2


@dataclass(frozen=True)
class Row:
    """Counts of one length, window, head size and source of separators, summed over sequences."""

    source: str
    length: int
    window: int
    head_size: int
    density: float
    sequences: int
    needed: int
    touched: Touched
    packed: Touched

    @property
    def waste(self) -> float:
        """Touched over needed pairs, forward and backward together."""
        return self.touched.mean / self.needed

    @property
    def bar(self) -> float | None:
        """Most that `waste` may be."""
        return BARS.get(self.length) if self.window == BAR_WINDOW else None

    @property
    def speedups(self) -> tuple[float, float, float]:
        """Over dense attention at equal cost of a pair: by the mask alone, forward, forward and backward."""
        dense = self.sequences * dense_touched(self.length)
        triangle = self.sequences * self.length * (self.length + 1) // 2
        total = DENSE_TOTAL * dense / self.touched.operations
        return triangle / self.needed, dense / self.touched.forward, total


def model_rows(text: str | None = None, lengths: tuple[int, ...] = LENGTHS) -> Iterator[Row]:
    """Counts on real text and, beside it, on separators by chance. Raises UserError for a text that is too short."""
    separators = load_separators(text)
    for length in lengths:
        count = max(1, _TOKENS // length)
        sources = {"text": text_rows(separators, length, count)}
        sources[f"chance {DENSITY:.0%}"] = random_rows(DENSITY, length, max(1, count // 4))
        for source, rows in sources.items():
            for window in WINDOWS:
                needed = sum(needed_pairs(row, window) for row in rows)
                for head_size in HEAD_SIZES:
                    tiles = shipped_tiles(head_size)
                    touched, packed = (
                        Touched(*np.sum([touched_pairs(row, window, tiles, groups) for row in rows], axis=0).tolist())
                        for groups in (1, 4)
                    )
                    density = float(rows.mean())
                    yield Row(source, length, window, head_size, density, len(rows), needed, touched, packed)


def print_model(text: str | None = None, lengths: tuple[int, ...] = LENGTHS) -> list[str]:
    """Prints the counts; returns a sentence for each bar that is missed."""
    print("Touched pairs over needed pairs (counted), and speed-up over dense at equal cost of a pair (not measured)")
    print(
        f"{'separators':<11} {'S':>6} {'n':>4} {'D':>4} {'special':>8} {'forward':>8} {'dQ':>5} {'dK/dV':>6} "
        f"{'all':>5} {'4 heads':>8} {'bar':>6} | {'limit':>6} {'forward':>8} {'fwd+bwd':>8}"
    )
    missed = []
    for row in model_rows(text, lengths):
        forward, dq, dkv = (pairs / row.needed for pairs in row.touched)
        limit, predicted_forward, predicted = row.speedups
        bar = "" if row.bar is None else f"{row.bar:.2f}" + ("" if row.waste <= row.bar else "!")
        print(
            f"{row.source:<11} {row.length:>6} {row.window:>4} {row.head_size:>4} {row.density:>8.1%} {forward:>8.2f} "
            f"{dq:>5.2f} {dkv:>6.2f} {row.waste:>5.2f} {row.packed.mean / row.needed:>8.2f} {bar:>6} | {limit:>5.2f}x "
            f"{predicted_forward:>7.2f}x {predicted:>7.2f}x",
            flush=True,
        )
        if row.bar is not None and row.waste > row.bar:
            missed.append(
                f"the kernels of D={row.head_size} touch {row.waste:.3f} pairs per needed one at S={row.length} "
                f"on separators of {row.source}, more than {row.bar}"
            )
    return missed


def main() -> int:
    """Print the model; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", metavar="PREFIX", help="prepared data set (default: the positions that ship)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    options = parser.parse_args()
    missed = print_model(options.text, tuple(options.lengths))
    for sentence in missed:
        print(f"error: {sentence}")
    return 1 if missed else 0


if __name__ == "__main__":
    exit_with(main)

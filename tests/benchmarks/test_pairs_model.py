"""The counted model: tiles as a simulation of the kernels' loops visits them, pairs as a dense mask holds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sep_attention import build_plan, visible_mask
from sep_attention.triton.tuning import KERNELS, Tile

from benchmarks.attention.pairs_model import (
    Row,
    Touched,
    dense_touched,
    needed_of_plan,
    needed_pairs,
    shipped_tiles,
    touched_pairs,
)
from benchmarks.attention.separator_text import load_separators, random_rows, text_rows, write_positions
from sepllm_train.base.errors import UserError

SIZES = [(1, 1), (63, 16), (200, 33), (257, 64), (100, 100), (90, 128)]


def _special(length: int, density: float = 0.15) -> NDArray[np.bool_]:
    special = np.random.default_rng(length).random(length) < density
    special[:3] = True
    return special


def _tiles(query_rows: int, key_rows: int) -> dict[str, Tile]:
    return {kernel: Tile(query_rows, key_rows, 4, 2) for kernel in KERNELS}


def _simulated_forward(special: NDArray[np.bool_], window: int, queries: int, keys: int) -> int:
    """Runs the query loop tile by tile, and checks that it reaches every visible pair."""
    length = len(special)
    positions = np.flatnonzero(special)
    touched, reached = 0, np.zeros((length, length), bool)
    for first in range(0, length, queries):
        end = min(first + queries, length)
        local = max(first - window + 1, 0) // 16 * 16
        compact = [position for position in positions if position < local]
        tiles = [compact[start : start + keys] for start in range(0, len(compact), keys)]
        tiles += [list(range(start, min(start + keys, length))) for start in range(local, end, keys)]
        for tile in tiles:
            touched += queries * keys
            reached[first:end, tile] = True
    _check_reached(special, window, reached)
    return touched


def _simulated_backward(special: NDArray[np.bool_], window: int, queries: int, keys: int) -> int:
    """Runs the loops of the programs that own keys, and checks that they reach every visible pair."""
    length = len(special)
    touched, reached = 0, np.zeros((length, length), bool)
    owners: list[tuple[NDArray[np.int64], int]] = [(np.arange(length), min(window, length))]
    if window < length:
        owners.append((np.flatnonzero(special), length))
    for owned, reach in owners:
        for start in range(0, len(owned), keys):
            tile = owned[start : start + keys]
            query = tile.min() // queries * queries
            while query < min(tile.max() + reach, length):
                touched += queries * keys
                reached[query : query + queries, tile] = True
                query += queries
    _check_reached(special, window, reached)
    return touched


def _check_reached(special: NDArray[np.bool_], window: int, reached: NDArray[np.bool_]) -> None:
    plan = build_plan(torch.from_numpy(special)[None])
    assert not (visible_mask(plan, window)[0].numpy() & ~reached).any()


@pytest.mark.parametrize(("length", "window"), SIZES)
def test_tiles_are_those_the_loops_visit(length: int, window: int) -> None:
    special = _special(length)
    for query_rows, key_rows in ((16, 16), (64, 32), (32, 64)):
        touched = touched_pairs(special, window, _tiles(query_rows, key_rows))
        assert touched.forward == touched.backward_q == _simulated_forward(special, window, query_rows, key_rows)
        assert touched.backward_kv == _simulated_backward(special, window, query_rows, key_rows)


def test_packed_heads_shorten_the_block_of_queries() -> None:
    special = _special(500)
    packed = touched_pairs(special, 32, _tiles(128, 16), groups=4)
    assert packed.forward == _simulated_forward(special, 32, 32, 16)
    assert packed.backward_kv == touched_pairs(special, 32, _tiles(128, 16)).backward_kv


@pytest.mark.parametrize(("length", "window"), [*SIZES, (700, 64)])
def test_needed_pairs_are_those_of_the_mask(length: int, window: int) -> None:
    special = _special(length)
    plan = build_plan(torch.from_numpy(special)[None])
    assert needed_pairs(special, window) == int(visible_mask(plan, window).sum()) == needed_of_plan(plan, window)


def test_speedups_by_hand() -> None:
    touched = Touched(forward=1000, backward_q=1000, backward_kv=2000)
    row = Row("text", 256, 16, 64, 0.1, 1, 800, touched, touched)
    assert row.waste == pytest.approx((4 * 1000 + 6 * 1000 + 8 * 2000) / 18 / 800)
    assert dense_touched(256) == 3 * 128 * 128
    assert row.speedups == pytest.approx((256 * 257 / 2 / 800, 49152 / 1000, 14 * 49152 / 26000))


@pytest.mark.parametrize("source", ["text", "chance"])
def test_bars(source: str) -> None:
    """The longest length is left to the gate: counting its pairs one by one takes seconds."""
    for length, bar in ((2048, 1.65), (8192, 1.27)):
        count = 65536 // length
        rows = text_rows(load_separators(), length, count) if source == "text" else random_rows(0.12, length, count)
        needed = sum(needed_pairs(row, 128) for row in rows)
        for head_size in (64, 128):
            touched = sum(touched_pairs(row, 128, shipped_tiles(head_size)).mean for row in rows)
            assert 1 < touched / needed <= bar


def test_text_of_a_prepared_data_set(tmp_path: Path) -> None:
    classes = np.array([0, 4, 9, 10, 0, 1], dtype=np.uint8)
    classes.tofile(tmp_path / "text.sep.bin")
    separators = load_separators(str(tmp_path / "text"))
    assert separators.tolist() == [False, True, True, False, False, True]
    write_positions(tmp_path / "kept.npz", separators)
    assert load_separators(str(tmp_path / "kept.npz")).tolist() == separators.tolist()
    assert text_rows(separators, 5, 2).tolist() == [[True] * 3 + [False] * 2, [True] * 3 + [False, True]]
    with pytest.raises(UserError, match="6 tokens, 7 are needed"):
        text_rows(separators, 7, 1)
    with pytest.raises(UserError, match="none.sep.bin does not exist"):
        load_separators(str(tmp_path / "none"))

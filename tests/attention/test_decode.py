"""The decoding cache in plain torch against its definition, its errors, and the runs of its kernels in processes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from sep_attention import FOREVER, DecodeCache, advance, attend, write

from tests.attention.decode_cases import (
    PUBLIC,
    DecodeCase,
    check_against_oracle,
    copied,
    decode_cases,
    ragged,
    rotated,
    step,
)
from tests.attention.interpreter_process import passes_in_the_interpreter
from tests.support.triton_support import needs_triton
from tests.support.waiting import HANG_SECONDS

BENCHMARK = "benchmarks.attention.decode"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=decode_cases(steps=40))
def test_steps_are_as_defined(case: DecodeCase) -> None:
    check_against_oracle(case, PUBLIC, 1e-5)


@pytest.mark.parametrize("rotary", [None, 6], ids=["training", "cache"])
def test_more_slots_than_a_program_attends_to_at_once(rotary: int | None) -> None:
    case = DecodeCase(capacity=600, separators=40, window=300, layers=1, batch=2, rotary=rotary, steps=3)
    check_against_oracle(case, PUBLIC, 1e-5)


def test_errors_of_moved_keys_do_not_add_up() -> None:
    # One separator in six tokens, of 120 that are kept: each moves by one slot at every compaction.
    case = DecodeCase(
        128, 1, 120, 2, layers=1, batch=1, kv_heads=1, groups=1, width=64, rotary=64, dtype=torch.bfloat16
    )
    cache = case.empty()
    reach = torch.tensor([0, FOREVER], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    plain: dict[int, torch.Tensor] = {}
    compactions = 0
    for position in range(850):
        advance(cache, torch.tensor([int(position < 128 or position % 6 == 0)]), reach)
        compactions += int(cache.moved[0] > 0)
        plain[position] = torch.randn(1, 1, 64, generator=generator)
        key = rotated(plain[position], int(cache.length) - 1, case.frequencies()).bfloat16()
        write(cache, 0, key, key)
    assert compactions > 110
    slots = range(int(cache.length))
    exact = torch.stack([rotated(plain[int(cache.position[0, i])][0, 0], i, case.frequencies()) for i in slots])
    error = (cache.keys[0, 0, 0, : len(slots)].double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    # Rounded twice: as it arrived and as it was turned.
    assert float(error.max()) < 2 * 2**-8
    assert int((cache.arrival[0, : len(slots)] - torch.arange(len(slots))).max()) > 100


def test_rows_without_keys() -> None:
    case = DecodeCase()
    cache, _ = ragged(case)
    cache.length.copy_(torch.tensor([12, 0, 5]))
    before = copied(cache)
    new = torch.randn(3, 2, 8)
    write(cache, 1, new, new)
    out = attend(cache, 1, torch.randn(3, 4, 8), 0.3)
    assert torch.equal(out[1], torch.zeros(4, 8)) and out[[0, 2]].abs().sum() > 0
    for name in ("keys", "values", "arrived"):
        changed = (getattr(cache, name) != getattr(before, name)).any(-1).nonzero().tolist()
        assert changed == [[1, row, head, slot] for row, slot in ((0, 11), (2, 4)) for head in (0, 1)], name


def test_a_row_starts_anew() -> None:
    case = DecodeCase(batch=1, steps=30)
    first, second = case.empty(), case.empty()
    for token in case.tokens():
        step(case, second, PUBLIC, token)
    second.length.zero_()
    second.seen.zero_()
    for token in case.tokens():
        assert torch.equal(step(case, first, PUBLIC, token), step(case, second, PUBLIC, token))


def test_views_gradients_and_an_output_of_the_callers() -> None:
    case = DecodeCase()
    cache, _ = ragged(case)
    same = copied(cache)
    joint = torch.randn(3, 8, 8, requires_grad=True)
    query, key, value = joint[:, :4], joint[:, 4:6], joint[:, 6:]
    out = torch.empty(3, 2, 4, 8)[:, 1]
    write(cache, 0, key, value)
    assert attend(cache, 0, query, 0.5, out) is out
    write(same, 0, key.detach().contiguous(), value.detach().contiguous())
    assert torch.equal(out, attend(same, 0, query.detach().contiguous(), 0.5))
    assert torch.equal(cache.keys, same.keys) and not cache.keys.requires_grad and not out.requires_grad


SIZES: dict[str, Any] = dict(
    zip(("layers", "batch", "heads", "kv_heads", "capacity", "head_size"), (1, 2, 4, 2, 9, 8), strict=True),
    initial=2,
    separators=3,
    window=3,
    dtype=torch.float32,
)
BAD_SIZES = [
    ({"capacity": 8}, r"8 slots are too few for initial=2 \+ separators=3 \+ window=3: they must be more than 8"),
    ({"window": 0}, "window=0 at least 1"),
    ({"initial": -1}, "initial=-1 and separators=3 must be at least 0"),
    ({"separators": -2}, "separators=-2 must be at least 0"),
    ({"heads": 3}, r"partial is \[2, 3, 1, 8\]: its second axis, .* of the 2 key-value heads"),
    ({"heads": 0}, r"partial is \[2, 0, 1, 8\]"),
    ({"batch": 0}, "batch must be at least 1, got 0"),
    ({"head_size": -1}, "head_size must be at least 1, got -1"),
    ({"dtype": torch.float64}, r"float32, got \[1, 2, 2, 9, 8\] of torch.float64"),
    ({"inverse_frequencies": torch.ones(5)}, "10 rotary features are more than the 8 of a head"),
    ({"inverse_frequencies": torch.ones(2, 2)}, r"inverse_frequencies must be \[R / 2\], got \[2, 2\]"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD_SIZES)
def test_sizes_that_do_not_fit(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DecodeCache.allocate(**SIZES | change)


BAD_TENSORS = [
    ({"length": torch.zeros(2)}, r"length must be \[2\] of torch.int32, got \[2\] of torch.float32"),
    ({"seen": torch.zeros(2, dtype=torch.int32)}, r"seen must be \[2\] of torch.int64"),
    ({"reach": torch.zeros(2, 8, dtype=torch.int32)}, r"reach must be \[2, 9\] of torch.int32, got \[2, 8\]"),
    ({"values": torch.zeros(1, 2, 2, 8, 9).transpose(3, 4)}, "the last axis of values must be contiguous"),
    ({"values": torch.zeros(1, 2, 9, 2, 8).transpose(2, 3)}, r"values must be contiguous, its strides are \[288, 144"),
    ({"arrived": None}, "arrived, turn_cos and turn_sin belong together"),
    ({"turn_sin": torch.zeros(9, 3)}, r"turn_sin must be \[9, 2\] of torch.float32, got \[9, 3\]"),
    ({"keys": torch.zeros(2, 2, 9, 8)}, r"keys must be .* got \[2, 2, 9, 8\]"),
    ({"moved": torch.zeros(2, dtype=torch.int32, device="meta")}, "moved is on meta but the cache is on cpu"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD_TENSORS)
def test_tensors_that_do_not_fit(change: dict[str, Any], sentence: str) -> None:
    cache = DecodeCache.allocate(**SIZES, inverse_frequencies=torch.ones(2))
    with pytest.raises(ValueError, match=sentence):
        replace(cache, **change)


def test_calls_that_do_not_fit() -> None:
    cache = DecodeCache.allocate(**SIZES)
    reach, ids = torch.zeros(5, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    new, query = torch.zeros(2, 2, 8), torch.zeros(2, 4, 8)
    bad = [
        (lambda: advance(cache, ids[:1], reach), r"ids must be \[2\] of torch.int64, got \[1\]"),
        (lambda: advance(cache, ids.int(), reach), "ids must be .* got .* of torch.int32"),
        (lambda: advance(cache, ids, reach.long()), "reach_of_token must be .* of torch.int32"),
        (lambda: advance(cache, ids, reach[:, None]), r"reach_of_token must be \[5\] of torch.int32, got \[5, 1\]"),
        (lambda: write(cache, 0, new.half(), new), "key must be .* of torch.float32, got .* of torch.float16"),
        (lambda: write(cache, 0, new, query), r"value must be \[2, 2, 8\] of torch.float32, got \[2, 4, 8\]"),
        (lambda: write(cache, 1, new, new), "layer 1 is not one of the cache's 1"),
        (lambda: attend(cache, -1, query, 1.0), "layer -1 is not one of the cache's 1"),
        (lambda: attend(cache, 0, new, 1.0), r"query must be \[2, 4, 8\] of torch.float32, got \[2, 2, 8\]"),
        (lambda: attend(cache, 0, query, 1.0, query[:1]), r"out must be \[2, 4, 8\]"),
        (lambda: attend(cache, 0, torch.zeros(2, 8, 4).mT, 1.0), "the last axis of query must be contiguous"),
    ]
    for call, sentence in bad:
        with pytest.raises(ValueError, match=sentence):
            call()


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    passes_in_the_interpreter("decode_interpreter_cases.py")


def _benchmark(repository: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", BENCHMARK, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, cwd=repository, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_needs_a_gpu(repository: Path) -> None:
    result = _benchmark(repository)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: There is no CUDA device here: run this on a machine with a GPU.\n"


def test_the_benchmark_as_far_as_a_cpu_goes(repository: Path, tmp_path: Path) -> None:
    output = tmp_path / "decode.json"
    result = _benchmark(repository, "--device", "cpu", "--output", output)
    assert result.returncode == 0, result.stderr
    rows = json.loads(output.read_text(encoding="utf8"))["rows"]
    assert rows and all(0 <= row["compaction_share"] < 1 and row["full_over_attend"] > 0 for row in rows)

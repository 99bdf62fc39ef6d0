"""What the kernels of the decoding cache compute, in Triton's interpreter: run by test_decode.py.

The interpreter proves indices and masks. Its bfloat16 products are wrong, and it knows no races: those are for the
compile gate, which sees that the kernels in place read before they write, and a GPU.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from sep_attention import DecodeCache, advance, attend, write
from sep_attention.decode.launch import launch_advance, launch_attend, launch_write
from torch import Tensor

from tests.attention.decode_cases import (
    PUBLIC,
    REACH,
    DecodeCase,
    Ops,
    check_against_oracle,
    copied,
    decode_cases,
    filled,
    ragged,
    step,
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


def _attend(cache: DecodeCache, layer: int, query: Tensor, scale: float) -> Tensor:
    out = torch.full_like(query, float("nan"))
    launch_attend(cache, layer, query, scale, out)
    return out


TRITON = Ops(launch_advance, launch_write, _attend)

CASES = {
    "plain": DecodeCase(),
    "training-positions": DecodeCase(rotary=None),
    "all-features-rotary": DecodeCase(rotary=8),
    "two-features-rotary": DecodeCase(rotary=2),
    "head-20": DecodeCase(width=20, rotary=10),
    "head-80": DecodeCase(width=80, rotary=20, steps=7),
    "one-head-each": DecodeCase(groups=1),
    "three-query-heads-each": DecodeCase(groups=3, batch=1),
    "twenty-query-heads-each": DecodeCase(groups=20, kv_heads=1),
    "window-of-one": DecodeCase(window=1),
    "no-separators": DecodeCase(separators=0),
    "no-initial-tokens": DecodeCase(initial=0),
    "nothing-but-a-window": DecodeCase(initial=0, separators=0, window=6),
    "a-slot-to-spare": DecodeCase(capacity=9),
    "more-slots-than-a-tile": DecodeCase(150, 3, 60, 40, layers=1),
    "tiles-that-move": DecodeCase(700, 3, 400, 150, layers=1, batch=2, steps=3, width=32, rotary=16),
    "parts": DecodeCase(600, 3, 40, 300, layers=1, steps=4),
    "parts-of-positions-that-stay": DecodeCase(520, 3, 20, 30, layers=1, steps=4, rotary=None),
    "past-32-bits": DecodeCase(seen=2**40),
    "fp16": DecodeCase(dtype=torch.float16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_steps_are_those_of_plain_torch(case: DecodeCase) -> None:
    cache, _ = ragged(case)
    expected = copied(cache)
    # What is past the last key may be anything.
    past = torch.arange(case.capacity) >= cache.length[:, None]
    for stored in (cache.keys, cache.values, cache.arrived):
        if stored is not None:
            stored.masked_fill_(past[None, :, None, :, None], float("nan"))
    compactions = 0
    for token in case.tokens():
        actual = step(case, cache, TRITON, token)
        torch.testing.assert_close(actual, step(case, expected, PUBLIC, token), **_tolerance(case))
        _same(cache, expected, case)
        compactions += int((cache.moved > 0).sum())
    assert compactions > 0


def _tolerance(case: DecodeCase) -> dict[str, float]:
    return {"rtol": TOLERANCE[case.dtype], "atol": TOLERANCE[case.dtype]}


def _same(cache: DecodeCache, expected: DecodeCache, case: DecodeCase) -> None:
    for name in ("length", "seen", "moved"):
        assert torch.equal(getattr(cache, name), getattr(expected, name)), name
    for name in ("reach", "position", "arrival", "values", "arrived"):
        if getattr(cache, name) is not None:
            assert torch.equal(filled(cache, name), filled(expected, name)), name
    torch.testing.assert_close(filled(cache, "keys"), filled(expected, "keys"), **_tolerance(case))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(case=decode_cases(steps=15))
def test_any_case_is_as_defined(case: DecodeCase) -> None:
    check_against_oracle(case, TRITON, 1e-5)


def test_bfloat16_is_moved_and_turned() -> None:
    case = DecodeCase(dtype=torch.bfloat16)
    cache, _ = ragged(case)
    expected = copied(cache)
    for ids, keys, values, _ in case.tokens():
        for which, ops in ((cache, TRITON), (expected, PUBLIC)):
            ops.advance(which, ids, REACH)
            for layer in range(case.layers):
                ops.write(which, layer, keys[layer].bfloat16(), values[layer].bfloat16())
        for name in ("keys", "values", "arrived"):
            torch.testing.assert_close(filled(cache, name), filled(expected, name), rtol=2**-7, atol=1e-6)


def test_bfloat16_products_are_refused() -> None:
    cache = DecodeCase(dtype=torch.bfloat16).empty()
    query = torch.zeros(3, 4, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter multiplies bfloat16 wrongly"):
        launch_attend(cache, 0, query, 1.0, query.clone())


@pytest.mark.parametrize("capacity", [12, 600])
def test_rows_without_keys(capacity: int) -> None:
    cache, _ = ragged(DecodeCase(capacity=capacity))
    cache.length[1] = 0
    before = copied(cache)
    new = torch.randn(3, 2, 8)
    launch_write(cache, 1, new, new)
    assert torch.equal(cache.keys[:, 1], before.keys[:, 1]) and torch.equal(
        cache.keys[:, 0, :, :-1], before.keys[:, 0, :, :-1]
    )
    out = _attend(cache, 1, torch.randn(3, 4, 8), 0.3)
    assert torch.equal(out[1], torch.zeros(4, 8)) and out.isfinite().all()


def test_views_are_taken_as_they_come() -> None:
    cache, _ = ragged(DecodeCase())
    same = copied(cache)
    joint, out = torch.randn(3, 8, 16)[..., 4:12], torch.full((3, 2, 4, 8), float("nan"))
    query, key, value = joint[:, :4], joint[:, 4:6], joint[:, 6:]
    launch_write(cache, 0, key, value)
    launch_attend(cache, 0, query, 0.5, out[:, 1])
    write(same, 0, key, value)
    torch.testing.assert_close(out[:, 1], attend(same, 0, query, 0.5))
    assert torch.equal(cache.keys, same.keys) and torch.equal(cache.values, same.values)
    assert out[:, 0].isnan().all()


def test_tensors_on_a_cpu_go_to_plain_torch() -> None:
    case = DecodeCase(dtype=torch.bfloat16, steps=3)
    cache, _ = ragged(case)
    for token in case.tokens():
        assert step(case, cache, Ops(advance, write, attend), token).isfinite().all()

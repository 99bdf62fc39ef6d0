"""The table of tile configurations, and what a compiled kernel depends on."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch

from tests.attention.decode_cases import REACH, DecodeCase
from tests.support.triton_support import NO_TRITON

pytest.importorskip("triton", reason=NO_TRITON)

from sep_attention import FOREVER, build_plan
from sep_attention.decode.kernels import advance_kernel, attend_kernel, combine_kernel, move_kernel, write_kernel
from sep_attention.decode.launch import launch_advance, launch_attend, launch_write
from sep_attention.triton.backward import attention_backward_kv, attention_backward_q
from sep_attention.triton.forward import attention_forward
from sep_attention.triton.op import document_end, kernel_constants
from sep_attention.triton.plan import plan_kernel, plan_tensors
from sep_attention.triton.tuning import (
    HEAD_SIZES,
    KERNELS,
    Tile,
    architecture_of,
    dot_precision,
    forced_tiles,
    packed_heads,
    select_tile,
    shipped_configurations,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature


def test_the_table_has_every_kernel_head_size_dtype_and_architecture_once() -> None:
    numbers = [("bf16", "half"), ("fp16", "half"), ("fp32", "tf32"), ("fp32", "ieee")]
    expected = {
        (kernel, head_size, dtype, precision, architecture)
        for kernel, head_size, (dtype, precision), architecture in product(KERNELS, HEAD_SIZES, numbers, (90, 80))
    }
    assert Counter(shipped[:5] for shipped in shipped_configurations()) == Counter(expected)


def test_tiles_are_powers_of_two_that_fit_the_padding_of_rows() -> None:
    for shipped in shipped_configurations():
        tile = shipped.tile
        assert tile.queries in (16, 32, 64, 128), shipped
        assert tile.keys in (16, 32, 64, 128), shipped
        assert tile.split is False or shipped.kernel == "backward_kv", shipped


@pytest.mark.parametrize(
    ("capability", "architecture"), [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 90), ((12, 0), 80)]
)
def test_architecture(capability: tuple[int, int], architecture: int) -> None:
    assert architecture_of(capability) == architecture


def test_an_old_device_is_refused() -> None:
    with pytest.raises(ValueError, match="needs compute capability 8.0, this device has 7.5"):
        architecture_of((7, 5))


@pytest.mark.parametrize(
    ("groups", "queries", "packed"), [(1, 128, 1), (2, 128, 2), (3, 128, 1), (6, 128, 2), (8, 128, 4), (8, 32, 1)]
)
def test_packed_heads(groups: int, queries: int, packed: int) -> None:
    assert packed_heads(groups, Tile(queries, 64, 4, 2)) == packed
    (constants,) = kernel_constants("forward", 64, "half", Tile(queries, 64, 4, 2), groups=groups)
    assert constants["PACK"] == packed


def test_split_tiles_launch_dk_and_dv_apart() -> None:
    launches = kernel_constants("backward_kv", 256, "half", Tile(32, 128, 8, 2, split=True))
    assert [(launch["WITH_K"], launch["WITH_V"]) for launch in launches] == [(True, False), (False, True)]


def test_float32_is_multiplied_as_torch_is_told() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert dot_precision(torch.float32) == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert dot_precision(torch.float32) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
    assert dot_precision(torch.bfloat16) == dot_precision(torch.float16) == "half"


def test_forced_tiles_end_with_their_context() -> None:
    cpu, tile = torch.device("cpu"), Tile(16, 128, 8, 2)
    before = select_tile("forward", 64, "half", cpu)
    with forced_tiles(forward=tile):
        assert select_tile("forward", 64, "half", cpu) == tile
        assert select_tile("backward_q", 64, "half", cpu) != tile
    assert select_tile("forward", 64, "half", cpu) == before


def test_no_layout_needs_another_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own specialisation of 1,000 launches of random layouts; only the launch on a GPU is left out."""
    compilations: dict[str, Counter[str]] = {}
    backend = make_backend(GPUTarget("cuda", 90, 32))
    for kernel in (attention_forward, attention_backward_q, attention_backward_kv):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        seen = compilations.setdefault(kernel.__name__, Counter())

        def run(
            *args: Any, bind: Any = bind, seen: Counter[str] = seen, grid: Any, warmup: bool, **kwargs: Any
        ) -> None:
            _, specialization, options = bind(*args, **kwargs)
            seen[repr((specialization, options))] += 1

        monkeypatch.setattr(kernel, "run", run)
    draw = random.Random(0)
    for _ in range(1000):
        _launch_random_layout(draw)
    assert {name: sum(seen.values()) for name, seen in compilations.items()} == dict.fromkeys(compilations, 1000)
    assert {name: len(seen) for name, seen in compilations.items()} == dict.fromkeys(compilations, 1)


def test_every_launch_asks_for_fused_multiplications_and_additions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's default differs between versions, and is part of what a kernel computes."""
    attention = (attention_forward, attention_backward_q, attention_backward_kv)
    decoding = (advance_kernel, move_kernel, write_kernel, attend_kernel, combine_kernel)
    asked: dict[str, list[Any]] = {}
    for kernel in (*attention, *decoding, plan_kernel):
        launches = asked.setdefault(kernel.__name__, [])

        def run(*_: Any, launches: list[Any] = launches, **options: Any) -> None:
            launches.append(options.get("enable_fp_fusion"))

        monkeypatch.setattr(kernel, "run", run)
    _launch_random_layout(random.Random(0))
    plan_tensors(torch.zeros(1, 5, dtype=torch.uint8), 1, None, 1)
    case = DecodeCase(capacity=600)
    cache, ids = case.empty(), torch.zeros(case.batch, dtype=torch.int64)
    new, query = torch.zeros(case.batch, case.kv_heads, case.width), torch.zeros(case.batch, cache.heads, case.width)
    launch_advance(cache, ids, REACH)
    launch_write(cache, 0, new, new)
    launch_attend(cache, 0, query, 1.0, torch.empty_like(query))
    assert asked == {name: [True] for name in asked}


def _launch_random_layout(draw: random.Random) -> None:
    batch, length = draw.randint(1, 4), draw.randint(1, 300)
    tier = torch.randint(0, 3, (batch, length), dtype=torch.uint8)
    starts = torch.zeros(batch, length, dtype=torch.int32)
    plan = build_plan(tier, initial_tokens=draw.randint(0, 9), document_start=starts, num_tiers=2)
    q = torch.empty(length, batch, 4, 64, dtype=torch.bfloat16).permute(1, 2, 0, 3)
    k = torch.empty(length, batch, 2, 64, dtype=torch.bfloat16).permute(1, 2, 0, 3)
    horizons = [FOREVER, draw.randint(1, 400)]
    ends = document_end(plan)
    rest = plan.tier, plan.prefix, plan.positions, starts, ends, None, draw.randint(1, 400), horizons, 0.125
    out, lse = torch.ops.sep_attention.triton_forward(q, k, k, *rest)
    torch.ops.sep_attention.triton_backward(out, q, k, k, out, lse, *rest)

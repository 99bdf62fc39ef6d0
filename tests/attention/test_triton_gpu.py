"""The compiled Triton kernels on a GPU: precision, determinism, graphs, many shapes, compilations."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from sep_attention import FOREVER, AttentionPlan, build_plan, reference_attention, select_backend, sep_attention
from torch import Tensor

from tests.attention.attention_cases import Case, relative_error
from tests.support.triton_support import NO_TRITON

pytest.importorskip("triton", reason=NO_TRITON)

from sep_attention.triton.op import document_end

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

HALF = (torch.bfloat16, torch.float16)


def _run(case: Case, plan: AttentionPlan, tensors: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Output and gradients on the tensors' device, in their dtype; "plain" is the oracle itself."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items() if name != "upstream"}
    arguments: dict[str, Any] = {"window": case.window, "horizons": case.horizons, "sink": leaves.get("sink")}
    inputs = leaves["q"], leaves["k"], leaves["v"], plan
    if backend == "plain":
        out = reference_attention(*inputs, **arguments)
    else:
        out = sep_attention(*inputs, **arguments, backend=backend)
    grads = torch.autograd.grad(out, list(leaves.values()), tensors["upstream"])
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _on_gpu(case: Case, dtype: torch.dtype) -> tuple[AttentionPlan, dict[str, Tensor]]:
    """The plan and tensors rounded to a dtype, laid out [S, B, heads, D] as megatron-core has them."""
    tensors = {name: tensor.to("cuda", dtype) for name, tensor in case.tensors().items()}
    for name, tensor in tensors.items():
        if tensor.dim() == 4:
            tensors[name] = tensor.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    return case.plan().to("cuda"), tensors


def _exact(case: Case, plan: AttentionPlan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return _run(case, plan, {name: tensor.double() for name, tensor in tensors.items()}, "plain")


@pytest.mark.parametrize(
    ("width", "groups"), [(32, 1), (64, 1), (64, 4), (80, 1), (96, 4), (128, 1), (128, 4), (256, 1)]
)
@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
def test_error_is_that_of_plain_attention(dtype: torch.dtype, width: int, groups: int) -> None:
    case = Case(length=1100, width=width, groups=groups, window=128, batch=2, run=2)
    plan, tensors = _on_gpu(case, dtype)
    exact, plain, ours = _exact(case, plan, tensors), *(_run(case, plan, tensors, name) for name in ("plain", "triton"))
    for name, value in exact.items():
        allowed = (2 if name == "out" else 3) * relative_error(plain[name], value)
        assert relative_error(ours[name], value) <= allowed, name


@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 1e-5), ("high", 5e-3)], ids=["ieee", "tf32"])
@pytest.mark.parametrize("width", [64, 96, 256])
def test_float32(width: int, precision: str, tolerance: float) -> None:
    case = Case(length=500, width=width, groups=2, window=40)
    plan, tensors = _on_gpu(case, torch.float32)
    exact = _exact(case, plan, tensors)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        ours = _run(case, plan, tensors, "triton")
    finally:
        torch.set_float32_matmul_precision(before)
    for name, value in exact.items():
        assert relative_error(ours[name], value) <= tolerance, name


@pytest.mark.parametrize("width", [32, 64, 80, 128])
@pytest.mark.parametrize("document_density", [None, 0.01], ids=["band", "documents"])
def test_rows_whose_first_tile_holds_nothing_in_sight(document_density: float | None, width: int) -> None:
    # Of a block of queries, the first keys are another document's, or before the band of all but the first rows.
    case = Case(length=1000, width=width, window=16, initial_tokens=0, density=0.0, document_density=document_density)
    plan, tensors = _on_gpu(case, torch.bfloat16)
    exact, ours = _exact(case, plan, tensors), _run(case, plan, tensors, "triton")
    for name, value in exact.items():
        assert relative_error(ours[name], value) <= 0.02, name


@pytest.mark.parametrize("width", [64, 128])
def test_two_backward_passes_give_the_same_bits(width: int) -> None:
    case = Case(length=3000, width=width, groups=4, window=128, sink=True, horizons=(FOREVER, 700), density=0.3)
    plan, tensors = _on_gpu(case, torch.bfloat16)
    first, second = (_run(case, plan, tensors, "triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# (dtype, head size, query heads per key-value head, tiers, documents, sink): each takes compilations of its own.
KINDS = [
    (torch.bfloat16, 64, 1, 1, False, False),
    (torch.bfloat16, 128, 4, 1, False, False),
    (torch.bfloat16, 64, 2, 4, True, True),
    (torch.bfloat16, 80, 3, 2, True, False),
    (torch.float16, 128, 1, 3, False, True),
    (torch.float16, 32, 1, 1, True, False),
    (torch.float32, 96, 2, 1, False, False),
    (torch.bfloat16, 256, 1, 1, False, False),
]


def _random_case(draw: random.Random) -> Case:
    dtype, width, groups, tiers, documents, sink = draw.choice(KINDS)
    length = draw.randint(1, 700)
    reach = [FOREVER, draw.randint(1, length + 40), draw.randint(1, 100), draw.randint(1, 300)]
    return Case(
        length=length,
        queries=draw.choice([None, draw.randint(1, length)]),
        batch=draw.randint(1, 3),
        kv_heads=draw.randint(1, 3),
        groups=groups,
        width=width,
        window=draw.choice([1, 2, draw.randint(1, length + 40), 64, FOREVER]),
        initial_tokens=draw.choice([0, 3, draw.randint(0, length + 40)]),
        density=draw.choice([0.0, 0.05, 0.12, 0.5, 1.0]),
        run=draw.randint(1, 4),
        horizons=tuple(reach[:tiers]),
        document_density=draw.choice([0.01, 0.1, 1.0]) if documents else None,
        sink=sink,
        seed=draw.randint(0, 10_000),
        dtype=dtype,
    )


@pytest.mark.slow
def test_two_hundred_random_shapes() -> None:
    draw = random.Random(0)
    for _ in range(200):
        case = _random_case(draw)
        plan, tensors = _on_gpu(case, case.dtype)
        tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-5}[case.dtype]
        exact, ours = _exact(case, plan, tensors), _run(case, plan, tensors, "triton")
        for name, value in exact.items():
            worst = float((ours[name].double() - value).abs().max() / value.abs().max().clamp_min(1.0))
            assert worst <= tolerance, f"{name} is off by {worst:.1e} for {case} in {case.dtype}"


def test_a_captured_graph_follows_its_inputs() -> None:
    case = Case(length=900, width=64, window=64, document_density=0.005, horizons=(FOREVER, 200), density=0.3)
    plan, tensors = _on_gpu(case, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            _run(case, plan, tensors, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _run(case, plan, tensors, "triton")
    other_plan, other = _on_gpu(replace(case, seed=5), torch.bfloat16)
    expected = _run(case, other_plan, other, "triton")
    for name, tensor in other.items():
        tensors[name].copy_(tensor)
    for name in ("tier", "prefix", "positions", "document_start"):
        getattr(plan, name).copy_(getattr(other_plan, name))
    plan.derived["document_end"].copy_(other_plan.derived["document_end"])
    graph.replay()
    for name, value in expected.items():
        assert torch.equal(captured[name], value), name


def test_no_host_sync() -> None:
    case = Case(length=500, width=64, window=64, document_density=0.01, sink=True)
    plan, tensors = _on_gpu(case, torch.bfloat16)
    _run(case, plan, tensors, "triton")
    plan.derived.clear()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _run(case, plan, tensors, "triton")
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_lengths_windows_and_horizons_share_one_compilation() -> None:
    from sep_attention.triton.backward import attention_backward_kv, attention_backward_q
    from sep_attention.triton.forward import attention_forward

    kernels = attention_forward, attention_backward_q, attention_backward_kv

    def compiled() -> list[int]:
        return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]

    draw = random.Random(1)
    counts = []
    for _ in range(50):
        length = draw.randint(1, 900)
        horizons = (FOREVER, draw.randint(1, 900))
        case = Case(length=length, width=64, window=draw.randint(1, 900), horizons=horizons, density=0.4)
        plan, tensors = _on_gpu(case, torch.bfloat16)
        _run(case, plan, tensors, "triton")
        counts.append(compiled())
    assert counts[-1] == counts[0]


@pytest.mark.parametrize("case", [Case(length=32768, width=1), Case(length=9999, horizons=(FOREVER, 9, 99), width=1)])
@pytest.mark.parametrize("document_density", [None, 0.01], ids=["one-document", "documents"])
def test_the_plan_is_the_one_built_on_the_cpu(case: Case, document_density: float | None) -> None:
    expected = replace(case, density=0.3, document_density=document_density, batch=3).plan()
    actual = build_plan(
        expected.tier.cuda(), document_start=_cuda(expected.document_start), num_tiers=len(case.horizons)
    )
    for name in ("tier", "prefix", "positions"):
        assert torch.equal(getattr(actual, name).cpu(), getattr(expected, name)), name
    ends = document_end(actual), document_end(expected)
    assert ends == (None, None) or torch.equal(ends[0].cpu(), ends[1])


def _cuda(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cuda()


def test_auto_picks_triton_for_sparse_layers() -> None:
    case = Case(length=600, width=64, window=64)
    plan, tensors = _on_gpu(case, torch.bfloat16)
    assert select_backend("auto", sequence_length=600, window=64, device="cuda", head_size=64).name == "triton"
    by_name, automatic = (_run(case, plan, tensors, backend) for backend in ("triton", "auto"))
    for name, value in by_name.items():
        assert torch.equal(value, automatic[name]), name


def test_compiles_into_one_graph() -> None:
    case = Case(length=600, width=64, window=64, groups=2)
    plan, tensors = _on_gpu(case, torch.bfloat16)
    q, k, v = (tensors[name].requires_grad_() for name in "qkv")

    def layer(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
        return sep_attention(q, k, v, plan, window=case.window).sin()

    expected = torch.autograd.grad(layer(q, k, v, plan), (q, k, v), tensors["upstream"])
    actual = torch.autograd.grad(torch.compile(layer, fullgraph=True)(q, k, v, plan), (q, k, v), tensors["upstream"])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)

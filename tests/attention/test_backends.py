"""Every backend against the naive reference: outputs and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from sep_attention import FOREVER, build_plan, reference_attention, sep_attention

from tests.attention.attention_cases import Case, assert_matches, cases, relative_error, run_backend

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}

EDGES = {
    "window-of-one": Case(window=1),
    "window-of-one-no-specials": Case(window=1, density=0.0, initial_tokens=0),
    "window-is-length": Case(window=70),
    "window-past-length": Case(window=1000),
    "one-token": Case(length=1, window=1),
    "shorter-than-a-block": Case(length=63),
    "just-past-a-block": Case(length=129),
    "odd-length-many-blocks": Case(length=411, window=37),
    "no-initial-tokens": Case(initial_tokens=0),
    "initial-tokens-past-length": Case(initial_tokens=1000),
    "no-separators": Case(density=0.0),
    "streaming-long": Case(density=0.0, length=300, window=20),
    "all-separators": Case(density=1.0, length=200),
    "runs-of-separators": Case(run=6, length=260),
    "grouped-queries": Case(groups=3, length=140),
    "one-row": Case(batch=1, length=260),
    "rows-differ": Case(batch=4, density=0.6, length=200),
    "last-query": Case(queries=1, length=300),
    "last-queries": Case(queries=131, length=300, groups=2, sink=True),
    "last-queries-full-window": Case(queries=150, length=300, window=1000),
    "last-queries-documents-tiers": Case(
        queries=90, document_density=0.02, horizons=(FOREVER, 60, 20), density=0.5, length=200
    ),
    "learned-sink": Case(sink=True, groups=2, length=260),
    "three-tiers": Case(horizons=(FOREVER, 40, 90), density=0.4, length=300),
    "horizon-below-window": Case(horizons=(FOREVER, 5), density=0.4, window=30, length=200),
    "only-finite-horizons": Case(horizons=(33, 150), density=0.5, initial_tokens=0, length=400, window=4),
    "documents": Case(document_density=0.02, length=300),
    "one-token-documents": Case(document_density=1.0),
    "documents-full-window": Case(document_density=0.02, window=1000, length=300),
    "documents-tiers-sink-groups": Case(
        document_density=0.01, horizons=(FOREVER, 60, 20), density=0.5, sink=True, groups=2, length=333, window=9
    ),
}


def _backends(case: Case) -> list[str]:
    names = ["blocked", "auto"]
    if not case.sink:
        names.append("masked")
        if case.window >= case.length and case.document_density is None:
            names.append("dense")
    return names


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES.keys())
def test_edge_case_matches_reference(case: Case, dtype: torch.dtype) -> None:
    plan, exact = case.plan(), case.tensors()
    expected = run_backend(case, "reference", plan, exact)
    tensors = {name: tensor.to(dtype) for name, tensor in exact.items()}
    for backend in _backends(case):
        assert_matches(run_backend(case, backend, plan, tensors), expected, TOLERANCE[dtype])


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_any_case_matches_reference(case: Case) -> None:
    plan, exact = case.plan(), case.tensors()
    expected = run_backend(case, "reference", plan, exact)
    for dtype, tolerance in TOLERANCE.items():
        tensors = {name: tensor.to(dtype) for name, tensor in exact.items()}
        for backend in _backends(case):
            assert_matches(run_backend(case, backend, plan, tensors), expected, tolerance)


@settings(max_examples=15, deadline=None)
@given(case=cases(sink=False, longest=150))
def test_flex_forward_matches_reference(case: Case) -> None:
    plan, tensors = case.plan(), case.tensors()
    expected = run_backend(case, "reference", plan, tensors, gradients=False)
    assert_matches(run_backend(case, "flex", plan, tensors, gradients=False), expected, 1e-6)


def test_scale_is_used_by_every_backend() -> None:
    case = Case()
    plan, tensors = case.plan(), case.tensors()
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    for window, backends in ((16, ["blocked", "masked", "flex"]), (70, ["dense"])):
        expected = reference_attention(q, k, v, plan, window=window, scale=0.7)
        for backend in backends:
            out = sep_attention(q, k, v, plan, window=window, scale=0.7, backend=backend)
            torch.testing.assert_close(out, expected, msg=lambda text, name=backend: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["odd-length-many-blocks", "grouped-queries", "learned-sink"])
def test_half_error_is_near_that_of_plain_torch(name: str, dtype: torch.dtype) -> None:
    case = replace(EDGES[name], width=64)
    plan = case.plan()
    rounded = {key: tensor.to(dtype) for key, tensor in case.tensors().items()}
    expected = run_backend(case, "reference", plan, {key: tensor.double() for key, tensor in rounded.items()})
    plain = run_backend(case, "reference", plan, rounded)
    ours = run_backend(case, "blocked", plan, rounded)
    for key, value in ours.items():
        assert value.dtype == dtype
        allowed = (2 if key == "out" else 3) * relative_error(plain[key], expected[key])
        assert relative_error(value, expected[key]) <= allowed, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_sink_of_full_precision_stays_so(backend: str, dtype: torch.dtype) -> None:
    """As `auto` has it for half heads of a width that no kernel takes: no error is larger than plain attention's, and
    that of the sink's gradient is one of its own type."""
    case = replace(EDGES["learned-sink"], width=40)
    plan = case.plan()
    rounded = {key: tensor.to(torch.float32 if key == "sink" else dtype) for key, tensor in case.tensors().items()}
    # Logits that half types cannot hold.
    rounded["sink"] += 2.0**-12
    expected = run_backend(case, "reference", plan, {key: tensor.double() for key, tensor in rounded.items()})
    ours = run_backend(case, backend, plan, rounded)
    without = {key: tensor for key, tensor in rounded.items() if key != "sink"}
    exact = run_backend(case, "reference", plan, {key: tensor.double() for key, tensor in without.items()})
    plain = run_backend(case, "masked", plan, without)
    assert ours["dsink"].dtype == torch.float32 and relative_error(ours["dsink"], expected["dsink"]) < 1e-5
    for key in ("out", "dq", "dk", "dv"):
        assert ours[key].dtype == dtype
        assert relative_error(ours[key], expected[key]) <= relative_error(plain[key], exact[key]), key


def test_sink_of_less_precision_than_the_queries_is_widened() -> None:
    case = EDGES["learned-sink"]
    plan, tensors = case.plan(), case.tensors()
    half = tensors["sink"].half()
    found, expected = (run_backend(case, "reference", plan, tensors | {"sink": sink}) for sink in (half, half.double()))
    assert torch.equal(found["out"], expected["out"]) and found["dsink"].dtype == torch.float16


def test_gradcheck() -> None:
    case = Case(length=9, batch=2, kv_heads=1, groups=2, width=2, window=2, horizons=(FOREVER, 4), sink=True)
    plan, tensors = case.plan(), case.tensors()
    leaves = [tensors[name].requires_grad_() for name in ("q", "k", "v", "sink")]

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        q, k, v, sink = inputs
        return sep_attention(q, k, v, plan, window=2, horizons=(FOREVER, 4), sink=sink, backend="blocked")

    assert torch.autograd.gradcheck(run, leaves)


def test_only_some_inputs_need_a_gradient() -> None:
    case = Case(sink=True)
    plan, tensors = case.plan(), case.tensors()
    sink = tensors["sink"].requires_grad_()
    out = sep_attention(
        tensors["q"], tensors["k"], tensors["v"], plan, window=case.window, sink=sink, backend="blocked"
    )
    (ours,) = torch.autograd.grad(out, sink, tensors["upstream"])
    torch.testing.assert_close(ours, run_backend(case, "reference", plan, tensors)["dsink"])


def test_no_sequences() -> None:
    q = torch.zeros(0, 2, 5, 4, requires_grad=True)
    plan = build_plan(torch.zeros(0, 5, dtype=torch.uint8))
    out = sep_attention(q, q, q, plan, window=2, backend="blocked")
    out.sum().backward()
    assert out.shape == q.shape

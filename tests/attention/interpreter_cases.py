"""What the Triton kernels compute, in Triton's interpreter: run by test_triton_interpreter.py with TRITON_INTERPRET=1.

The interpreter proves masks and indices. Its bfloat16 products are wrong, and it knows no precision modes, pipelines
or races: those are for the compile gate and a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sep_attention import FOREVER, AttentionPlan, build_plan, sep_attention, visible_mask
from sep_attention.plan import effective_reach
from sep_attention.triton.op import document_end, triton_attention
from sep_attention.triton.plan import plan_tensors
from sep_attention.triton.tuning import KERNELS, Tile, forced_tiles
from torch import Tensor

from tests.attention.attention_cases import Case, assert_matches, cases, run_backend

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
# Wide and narrow tiles of queries and keys; 64 queries hold two heads of a group, split takes two launches for dK, dV.
UNEQUAL = (Tile(64, 16, 4, 1), Tile(64, 16, 4, 1), Tile(16, 64, 4, 1, split=True))


@dataclass(frozen=True)
class KernelCase(Case):
    """A case of one key-value head of size 32 and tiles of 32 unless it says otherwise."""

    width: int = 32
    kv_heads: int = 1
    tiles: tuple[Tile, Tile, Tile] | None = None
    plain_row: bool = False
    dtype: torch.dtype = field(default=torch.float32, compare=False)

    def plan(self) -> AttentionPlan:
        """As drawn; with `plain_row` the last sequence has no special token."""
        plan = super().plan()
        if not self.plain_row:
            return plan
        tier = plan.tier.clone()
        tier[-1] = 0
        return build_plan(tier, document_start=plan.document_start, num_tiers=plan.num_tiers)


EDGES = {
    "plain": KernelCase(length=150, window=32, kv_heads=2),
    "no-separators": KernelCase(density=0.0),
    "no-special-tokens": KernelCase(density=0.0, initial_tokens=0),
    "all-separators": KernelCase(density=1.0),
    "runs-of-separators": KernelCase(run=9, length=111),
    "one-sequence-without": KernelCase(plain_row=True, length=111),
    "length-of-whole-blocks": KernelCase(length=128),
    "length-of-whole-padding": KernelCase(length=128, window=31, density=0.5, batch=1),
    "shorter-than-a-block": KernelCase(length=7),
    "one-token": KernelCase(length=1, window=1),
    "length-63": KernelCase(length=63),
    "length-111": KernelCase(length=111, window=20),
    "window-of-one": KernelCase(window=1),
    "window-of-one-without-specials": KernelCase(window=1, initial_tokens=0, density=0.0),
    "window-31": KernelCase(window=31),
    "window-33": KernelCase(window=33),
    "window-past-length": KernelCase(window=1000),
    "window-is-length": KernelCase(window=70),
    "window-just-below-length": KernelCase(window=69),
    "no-initial-tokens": KernelCase(initial_tokens=0),
    "more-initial-tokens-than-a-block": KernelCase(initial_tokens=40),
    "more-initial-tokens-than-tokens": KernelCase(initial_tokens=500, length=40),
    "four-query-heads-each": KernelCase(groups=4, batch=1),
    "two-key-value-heads": KernelCase(kv_heads=2, groups=3, length=63, batch=1),
    "unequal-tiles": KernelCase(tiles=UNEQUAL, length=111),
    "packed-heads": KernelCase(tiles=UNEQUAL, length=93, groups=4, kv_heads=2, batch=1),
    "fp16": KernelCase(dtype=torch.float16),
    "head-64": KernelCase(width=64),
    "head-80": KernelCase(width=80, length=63),
    "head-96": KernelCase(width=96, length=63),
    "head-128": KernelCase(width=128),
    "head-256": KernelCase(width=256, length=40, tiles=(Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), UNEQUAL[2])),
    "two-tiers": KernelCase(horizons=(FOREVER, FOREVER), density=0.4, length=111),
    "three-tiers": KernelCase(horizons=(FOREVER, 40, 90), density=0.4, length=150),
    "four-tiers": KernelCase(horizons=(FOREVER, 30, 60, 100), density=0.5, length=130, batch=1, tiles=UNEQUAL),
    "horizon-below-window": KernelCase(horizons=(FOREVER, 5), density=0.4, window=30, length=111),
    "horizon-is-window": KernelCase(horizons=(16,), density=0.4, initial_tokens=0),
    "one-finite-horizon": KernelCase(horizons=(50,), density=0.5, length=150, window=4),
    "whole-tiles-beyond-the-horizon": KernelCase(
        horizons=(70,), density=1.0, length=150, window=4, initial_tokens=0, batch=1, tiles=UNEQUAL
    ),
    "whole-tiles-beyond-the-document": KernelCase(
        document_density=0.02, density=1.0, length=150, window=4, batch=1, seed=1, tiles=UNEQUAL
    ),
    "documents": KernelCase(document_density=0.02, length=150),
    "one-token-documents": KernelCase(document_density=1.0),
    "documents-full-window": KernelCase(document_density=0.05, window=1000),
    "last-query": KernelCase(queries=1, length=111),
    "last-queries": KernelCase(queries=70, length=150, kv_heads=2),
    "last-queries-of-whole-blocks": KernelCase(queries=64, length=128, window=20),
    "last-queries-past-some-windows": KernelCase(queries=33, length=150, density=0.0, initial_tokens=0),
    "last-queries-full-window": KernelCase(queries=50, length=111, window=1000),
    "last-queries-and-everything": KernelCase(
        queries=61,
        horizons=(FOREVER, 60, 20),
        density=0.5,
        document_density=0.03,
        sink=True,
        groups=2,
        length=133,
        window=9,
        tiles=UNEQUAL,
    ),
    "sink": KernelCase(sink=True),
    "sink-packed": KernelCase(sink=True, groups=2, length=63, tiles=UNEQUAL),
    "everything": KernelCase(
        horizons=(FOREVER, 60, 20), density=0.5, document_density=0.03, sink=True, groups=2, length=133, window=9
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _outputs_start_as_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _tiles(case: KernelCase) -> dict[str, Tile]:
    return {} if case.tiles is None else dict(zip(KERNELS, case.tiles, strict=True))


def _check(case: KernelCase, layout: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
    plan, exact = case.plan(), case.tensors()
    expected = run_backend(case, "reference", plan, {name: tensor.double() for name, tensor in exact.items()})
    with forced_tiles(**_tiles(case)):
        tensors = {name: layout(tensor) if tensor.dim() == 4 else tensor for name, tensor in exact.items()}
        assert_matches(run_backend(case, "triton", plan, tensors), expected, TOLERANCE[case.dtype])


@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES.keys())
def test_edge(case: KernelCase) -> None:
    _check(case)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(case=cases(longest=80), unequal=st.booleans())
def test_any_mask(case: Case, unequal: bool) -> None:
    fields = {name: getattr(case, name) for name in case.__dataclass_fields__}
    fields |= {"width": 32, "dtype": torch.float32, "batch": min(case.batch, 2), "kv_heads": 1}
    _check(KernelCase(**fields, tiles=UNEQUAL if unequal else None))


def _sequence_first(tensor: Tensor) -> Tensor:
    return tensor.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def _slice_of_wider(tensor: Tensor) -> Tensor:
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 16), float("nan"))
    wide[..., 16:] = tensor
    return wide[..., 16:]


LAYOUTS = {
    "sequence-first": _sequence_first,
    "head-last": lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
    "slice": _slice_of_wider,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_strides_are_taken_as_they_come(layout: Callable[[Tensor], Tensor]) -> None:
    case = KernelCase(length=63, groups=2)
    leaves = {name: layout(tensor) for name, tensor in case.tensors().items()}
    upstream = leaves.pop("upstream")
    for leaf in leaves.values():
        leaf.requires_grad_()
    out = triton_attention(*leaves.values(), case.plan(), window=case.window)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    assert sorted(range(4), key=out.stride) == sorted(range(4), key=leaves["q"].stride)
    expected = run_backend(case, "reference", case.plan(), {n: x.double() for n, x in case.tensors().items()})
    named = {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    assert_matches(named, expected, 1e-5)


def test_a_broadcast_upstream_gradient() -> None:
    case = KernelCase(length=40)
    q, k, v, _ = (tensor.requires_grad_() for tensor in case.tensors().values())
    triton_attention(q, k, v, case.plan(), window=case.window).sum().backward()
    expected = run_backend(case, "reference", case.plan(), case.tensors() | {"upstream": torch.ones_like(q)})
    assert_matches({"dq": q.grad, "dk": k.grad, "dv": v.grad}, {n: expected[n] for n in ("dq", "dk", "dv")}, 1e-5)


def test_log_of_the_denominators() -> None:
    case = KernelCase(length=63, sink=True)
    tensors, plan = case.tensors(), case.plan()
    q, k, sink = tensors["q"], tensors["k"], tensors["sink"]
    arguments = _op_arguments(case, plan, sink)
    _, lse = torch.ops.sep_attention.triton_forward(q, k, tensors["v"], *arguments)
    scores = q.double() @ k.double().transpose(2, 3) * arguments[-1]
    scores = scores.masked_fill(~visible_mask(plan, case.window)[:, None], float("-inf"))
    column = sink.double()[None, :, None, None].expand(*scores.shape[:3], 1)
    torch.testing.assert_close(lse.double(), torch.cat((scores, column), -1).logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_two_backward_passes_give_the_same_bits() -> None:
    case = KernelCase(length=63, sink=True, groups=2, horizons=(FOREVER, 40), density=0.4)
    first, second = (run_backend(case, "triton", case.plan(), case.tensors()) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def _op_arguments(case: Case, plan: AttentionPlan, sink: Tensor | None) -> tuple:
    starts, ends = plan.document_start, document_end(plan)
    horizons = list(effective_reach(plan, case.window, case.horizons))
    return plan.tier, plan.prefix, plan.positions, starts, ends, sink, case.window, horizons, case.width**-0.5


@pytest.mark.parametrize(
    "case",
    [KernelCase(length=33, batch=1), KernelCase(length=33, document_density=0.1, sink=True, horizons=(FOREVER, 20))],
    ids=["paper", "everything"],
)
def test_ops_are_registered_as_they_behave(case: KernelCase) -> None:
    tensors, plan = case.tensors(), case.plan()
    q, k, v = (_sequence_first(tensors[name]) for name in "qkv")
    arguments = _op_arguments(case, plan, tensors.get("sink"))
    out, lse = torch.ops.sep_attention.triton_forward(q, k, v, *arguments)
    torch.library.opcheck(
        torch.ops.sep_attention.triton_backward.default, (tensors["upstream"], q, k, v, out, lse, *arguments)
    )
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    torch.library.opcheck(torch.ops.sep_attention.triton_forward.default, (*leaves, *arguments))


@pytest.mark.parametrize("document_density", [None, 0.1], ids=["one-document", "documents"])
def test_compiles_into_one_graph(document_density: float | None) -> None:
    def layers(x: Tensor, weight: Tensor, plan: AttentionPlan) -> Tensor:
        q, k, v = (x @ weight).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        out = sep_attention(q, k, v, plan, window=9, backend="triton")
        out = out + sep_attention(q, k, v, plan, window=4, horizons=[20], backend="triton")
        return out.transpose(1, 2).flatten(2).sin().sum()

    weight = (torch.randn(64, 192, generator=torch.Generator().manual_seed(0)) * 0.1).requires_grad_()
    compiled = torch.compile(layers, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (40, 33):
        case = KernelCase(length=length, document_density=document_density)
        x = torch.randn(2, length, 64, generator=torch.Generator().manual_seed(length))
        (expected,) = torch.autograd.grad(layers(x, weight, case.plan()), weight)
        (actual,) = torch.autograd.grad(compiled(x, weight, case.plan()), weight)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("document_density", [None, 0.05, 1.0], ids=["one-document", "documents", "one-token-each"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("tiers", [1, 3])
def test_one_kernel_builds_the_plan(tiers: int, length: int, document_density: float | None) -> None:
    generator = torch.Generator().manual_seed(length)
    tier = torch.randint(0, tiers + 1, (2, length), dtype=torch.uint8, generator=generator)
    tier *= torch.rand(2, length, generator=generator) < 0.4
    starts = None
    if document_density is not None:
        first = torch.rand(2, length, generator=generator) < document_density
        starts = torch.where(first, torch.arange(length), 0).cummax(1).values.int()
    plan = build_plan(tier, initial_tokens=3, document_start=starts, num_tiers=tiers)
    built = plan_tensors(tier, 3, starts, tiers, block=64)
    for name, actual, expected in zip(
        ("tier", "prefix", "positions", "ends"),
        built,
        (plan.tier, plan.prefix, plan.positions, document_end(plan)),
        strict=True,
    ):
        assert (actual is expected is None) or torch.equal(actual, expected), name


def _bad_calls() -> dict[str, tuple[dict, str]]:
    def same(dtype: torch.dtype, width: int = 32) -> dict[str, Tensor]:
        return dict.fromkeys("qkv", torch.zeros(1, 1, 3, width, dtype=dtype))

    torch.use_deterministic_algorithms(False)  # else the gigabytes between the rows would be filled
    far = torch.empty_strided((1, 1, 3, 32), (32, 32, 2**30, 1), dtype=torch.float16)
    torch.use_deterministic_algorithms(True)
    return {
        "head-size": (same(torch.float32, 48), "no configuration for head size 48, only for 32, 64, 80, 96, 128, 256"),
        "scale-of-zero": ({"scale": 0.0}, "needs a scale above 0, got 0.0"),
        "scale-not-a-number": ({"scale": float("nan")}, "needs a scale above 0, got nan"),
        "double": (same(torch.float64), "float16 or float32, got torch.float64"),
        "bfloat16-interpreted": (same(torch.bfloat16), "interpreter multiplies bfloat16 wrongly"),
        "far-apart": (
            same(torch.float16) | {"k": far},
            "k spans 3 tokens times a stride of 1073741824 elements, .* fewer than 2147483648",
        ),
    }


def test_bad_input() -> None:
    plan = build_plan(torch.zeros(1, 3, dtype=torch.uint8))
    good = dict.fromkeys("qkv", torch.zeros(1, 1, 3, 32))
    for change, sentence in _bad_calls().values():
        with pytest.raises(ValueError, match=sentence):
            sep_attention(**good | change, plan=plan, window=2, backend="triton")

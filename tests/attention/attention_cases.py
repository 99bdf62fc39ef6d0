"""Random and named attention cases, shared by the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from sep_attention import FOREVER, AttentionPlan, build_plan, reference_attention, sep_attention
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Everything that decides one call; tensors follow from the seed."""

    length: int = 70
    queries: int | None = None
    batch: int = 2
    kv_heads: int = 2
    groups: int = 1
    width: int = 8
    window: int = 16
    initial_tokens: int = 3
    density: float = 0.12
    run: int = 1
    horizons: tuple[int, ...] = (FOREVER,)
    document_density: float | None = None
    sink: bool = False
    seed: int = 0
    dtype: torch.dtype = field(default=torch.float64, compare=False)

    def plan(self) -> AttentionPlan:
        """Tiers drawn per row, each special token repeated `run` times; rows differ in their number of specials."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.length)
        density = self.density * torch.linspace(1.0, 0.5, self.batch)[:, None] if self.density < 1 else 1.0
        special = torch.rand(shape, generator=generator) < density
        for _ in range(self.run - 1):
            special[:, 1:] |= special[:, :-1].clone()
        tier = special * torch.randint(1, len(self.horizons) + 1, shape, generator=generator)
        document_start = None
        if self.document_density is not None:
            first = torch.rand(shape, generator=generator) < self.document_density
            document_start = torch.where(first, torch.arange(self.length), 0).cummax(1).values
        return build_plan(
            tier.to(torch.uint8),
            initial_tokens=self.initial_tokens,
            document_start=document_start,
            num_tiers=len(self.horizons),
        )

    def tensors(self) -> dict[str, Tensor]:
        """q, k, v, the gradient of the output and, when asked for, the sink."""
        generator = torch.Generator().manual_seed(self.seed + 1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        heads = self.kv_heads * self.groups
        wide = (self.batch, heads, self.queries or self.length, self.width)
        narrow = (self.batch, self.kv_heads, self.length, self.width)
        tensors = {"q": draw(*wide), "k": draw(*narrow), "v": draw(*narrow), "upstream": draw(*wide)}
        return tensors | ({"sink": draw(heads)} if self.sink else {})


def run_backend(
    case: Case, backend: str, plan: AttentionPlan, tensors: dict[str, Tensor], gradients: bool = True
) -> dict[str, Tensor]:
    """Output and gradients, by name, of one backend ("reference" calls the oracle itself)."""
    leaves = {name: x.detach().clone().requires_grad_(gradients) for name, x in tensors.items() if name != "upstream"}
    arguments = {"window": case.window, "horizons": case.horizons, "sink": leaves.get("sink")}
    inputs = leaves["q"], leaves["k"], leaves["v"], plan
    if backend == "reference":
        out = reference_attention(*inputs, **arguments)
    else:
        out = sep_attention(*inputs, **arguments, backend=backend)
    results = {"out": out.detach()}
    if gradients:
        grads = torch.autograd.grad(out, list(leaves.values()), tensors["upstream"])
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected, in float64."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_matches(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every output and gradient lies within a relative tolerance of the expected one and is finite."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.isfinite().all(), f"{name} is not finite"
        scale = expected[name].double().abs().max().clamp_min(1.0)
        worst = float((value.double() - expected[name].double()).abs().max() / scale)
        assert worst <= tolerance, f"{name} is off by {worst:.1e} relative, allowed {tolerance:.0e}"


@st.composite
def cases(draw: st.DrawFn, sink: bool | None = None, longest: int = 300) -> Case:
    """Any legal case up to `longest` tokens; windows and horizons reach past both ends of the sequence."""
    length = draw(st.integers(1, longest))
    reach = st.integers(1, length + 40)
    tiers = draw(st.integers(1, 4))
    return Case(
        length=length,
        queries=draw(st.one_of(st.none(), st.integers(1, length))),
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 3)),
        width=draw(st.sampled_from([1, 8, 16])),
        window=draw(st.one_of(reach, st.integers(1, 3), st.just(FOREVER))),
        initial_tokens=draw(st.one_of(st.integers(0, 4), reach)),
        density=draw(st.sampled_from([0.0, 0.05, 0.12, 0.5, 1.0])),
        run=draw(st.integers(1, 4)),
        horizons=tuple(draw(st.one_of(reach, st.just(FOREVER))) for _ in range(tiers)),
        document_density=draw(st.sampled_from([None, 0.01, 0.1, 1.0])),
        sink=draw(st.booleans()) if sink is None else sink,
        seed=draw(st.integers(0, 10_000)),
    )

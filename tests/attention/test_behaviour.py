"""What the op promises beyond its values: independence of documents, layout, memory, determinism, recomputation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sep_attention.blocked as blocked
import torch
from sep_attention import AttentionPlan, build_plan, sep_attention
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.attention.attention_cases import Case, run_backend

PACKED = Case(length=400, batch=1, groups=2, window=24, dtype=torch.float32, horizons=(2**30, 50))
STARTS = torch.tensor([0] * 150 + [150] * 117 + [267] * 133)[None]
CHANGED = slice(150, 267)


def _packed(change_classes: bool, change_values: bool) -> dict[str, Tensor]:
    """The packed case's results with its middle document changed, with that document cut out."""
    tier = (torch.arange(400) % 9 == 0).to(torch.uint8)[None] * 2
    tensors = PACKED.tensors()
    generator = torch.Generator().manual_seed(99)
    if change_classes:
        tier[:, CHANGED] = (torch.rand(1, 117, generator=generator) < 0.4).to(torch.uint8)
    if change_values:
        for tensor in tensors.values():
            tensor[:, :, CHANGED] = torch.randn(tensor[:, :, CHANGED].shape, generator=generator)
    plan = build_plan(tier, initial_tokens=3, document_start=STARTS, num_tiers=2)
    results = run_backend(PACKED, "blocked", plan, tensors)
    return {name: torch.cat((x[:, :, : CHANGED.start], x[:, :, CHANGED.stop :]), 2) for name, x in results.items()}


def test_other_documents_are_bitwise_the_same_when_classes_stay() -> None:
    before, after = _packed(False, False), _packed(False, True)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_other_documents_stay_within_rounding_when_classes_change() -> None:
    before, after = _packed(False, False), _packed(True, True)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_rows_do_not_touch_each_other() -> None:
    case = Case(batch=3, length=200, density=0.5, dtype=torch.float32)
    plan, tensors = case.plan(), case.tensors()
    together = run_backend(case, "blocked", plan, tensors)
    for row in range(3):
        own = AttentionPlan(plan.tier[row : row + 1], plan.prefix[:, row : row + 1], plan.positions[:, row : row + 1])
        alone = run_backend(case, "blocked", own, {name: x[row : row + 1] for name, x in tensors.items()})
        for name, value in alone.items():
            assert torch.equal(value[0], together[name][row]), name


def test_same_input_same_bits() -> None:
    case = Case(length=300, batch=2, sink=True, dtype=torch.float32)
    first, second = (run_backend(case, "blocked", case.plan(), case.tensors()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def _megatron_views(case: Case, fused: bool) -> list[Tensor]:
    """q, k, v as megatron hands them over: [s, b, h, d] tensors (or slices of one fused projection), permuted."""
    shape = (case.length, case.batch, case.kv_heads, case.width)
    generator = torch.Generator().manual_seed(5)
    if fused:
        parts = torch.randn(*shape[:3], 3 * case.width, generator=generator).split(case.width, -1)
    else:
        parts = tuple(torch.randn(shape, generator=generator) for _ in range(3))
    return [part.permute(1, 2, 0, 3) for part in parts]


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused-projection"])
@pytest.mark.parametrize("batch", [1, 2])
def test_output_in_megatrons_layout_is_a_view(batch: int, fused: bool) -> None:
    case = Case(batch=batch, length=150, dtype=torch.float32)
    q, k, v = _megatron_views(case, fused)
    out = sep_attention(q, k, v, case.plan(), window=16, backend="blocked")
    flat = out.permute(2, 0, 1, 3).reshape(150, batch, case.kv_heads * case.width)
    assert flat.is_contiguous()
    assert flat.data_ptr() == out.data_ptr()
    plain = sep_attention(q.contiguous(), k.contiguous(), v.contiguous(), case.plan(), window=16, backend="blocked")
    assert torch.equal(out, plain)


def test_permuted_input_is_saved_and_not_copied() -> None:
    case = Case(batch=2, length=150, dtype=torch.float32)
    leaves = [view.requires_grad_() for view in _megatron_views(case, fused=True)]
    out = sep_attention(*leaves, case.plan(), window=16, backend="blocked")
    saved = out.grad_fn.saved_tensors
    assert [x.data_ptr() for x in saved if x is not None] == [x.data_ptr() for x in leaves]


def test_uninitialised_memory_never_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(length=300, batch=2, groups=2, sink=True, document_density=0.01, dtype=torch.float32)
    clean = run_backend(case, "blocked", case.plan(), case.tensors())
    empty, like = torch.empty, blocked._like

    def poisoned_empty(*shape: int, **options: torch.dtype) -> Tensor:
        tensor = empty(*shape, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned_empty)
    monkeypatch.setattr(blocked, "_like", lambda tensor: like(tensor).fill_(float("nan")))
    poisoned = run_backend(case, "blocked", case.plan(), case.tensors())
    for name, value in clean.items():
        assert torch.equal(value, poisoned[name]), name


def test_nothing_of_size_length_squared_is_kept() -> None:
    case = Case(length=2048, batch=1, kv_heads=1, window=64, dtype=torch.float32)
    plan = case.plan()
    q, k, v = (case.tensors()[name].requires_grad_() for name in "qkv")
    out = sep_attention(q, k, v, plan, window=64, backend="blocked")
    kept = sum(x.numel() for x in out.grad_fn.saved_tensors if x is not None)
    (layouts,) = plan.derived.values()
    kept += sum(bias.numel() for layout in layouts for block in layout.blocks for _, bias in block.biases)
    assert kept < 2048 * 2048 / 8


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensor-hooks", "reentrant"])
def test_activation_recomputation_gives_the_same_bits(reentrant: bool) -> None:
    case = Case(length=200, groups=2, dtype=torch.float32)
    plan, tensors = case.plan(), case.tensors()
    expected = run_backend(case, "blocked", plan, tensors)
    q, k, v = (tensors[name].clone().requires_grad_() for name in "qkv")

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sep_attention(q, k, v, plan, window=case.window, horizons=case.horizons, backend="blocked")

    checkpoint(layer, q, k, v, use_reentrant=reentrant).backward(tensors["upstream"])
    for name, leaf in (("dq", q), ("dk", k), ("dv", v)):
        assert torch.equal(leaf.grad, expected[name]), name


def test_compiled_code_runs_around_it() -> None:
    case = Case(length=150, dtype=torch.float32)
    plan, tensors = case.plan(), case.tensors()
    expected = run_backend(case, "blocked", plan, tensors)
    q, k, v = (tensors[name].clone().requires_grad_() for name in "qkv")

    @torch.compile(backend="aot_eager")
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * sep_attention(q, k, v, plan, window=16, horizons=case.horizons, backend="blocked")

    out = layer(q, k, v)
    torch.testing.assert_close(out, 2 * expected["out"])
    out.backward(tensors["upstream"] / 2)
    torch.testing.assert_close(q.grad, expected["dq"])


def test_layers_share_what_was_derived() -> None:
    case = Case(length=300, dtype=torch.float32)
    plan, tensors = case.plan(), case.tensors()
    for window in (16, 16, 64, 16):
        run_backend(replace(case, window=window), "blocked", plan, tensors)
    assert len(plan.derived) == 2

"""Which backend runs, and what is refused with which sentence."""

from __future__ import annotations

import pytest
import torch
from sep_attention import available_backends, build_plan, select_backend, sep_attention

from tests.attention.attention_cases import Case
from tests.support.triton_support import needs_triton


@pytest.mark.parametrize(
    ("situation", "name"),
    [
        ({"sequence_length": 4096, "window": 4096}, "dense"),
        ({"sequence_length": 4096, "window": 4096, "separate_documents": True}, "blocked"),
        ({"sequence_length": 4096, "window": 4096, "sink": True}, "blocked"),
        ({"sequence_length": 4096, "window": 64}, "blocked"),
        ({"sequence_length": 128, "window": 64}, "masked"),
        ({"sequence_length": 128, "window": 64, "sink": True}, "blocked"),
        pytest.param({"sequence_length": 4096, "window": 64, "device": "cuda"}, "triton", marks=needs_triton),
        ({"sequence_length": 4096, "window": 64, "device": "cuda", "head_size": 8}, "flex"),
        ({"sequence_length": 4096, "window": 64, "device": "cuda", "dtype": torch.float64}, "flex"),
        ({"sequence_length": 4096, "window": 64, "device": "cuda", "head_size": 8, "sink": True}, "reference"),
        pytest.param(
            {"sequence_length": 4096, "window": 64, "device": "cuda", "sink": True}, "triton", marks=needs_triton
        ),
        ({"sequence_length": 4096, "window": 4096, "device": "cuda"}, "dense"),
    ],
)
def test_auto(situation: dict, name: str) -> None:
    choice = select_backend("auto", **situation)
    assert choice.name == name
    assert choice.reason
    assert name in available_backends(situation.get("device", "cpu"))


@pytest.mark.parametrize(
    ("backend", "situation", "sentence"),
    [
        ("flash", {}, "backend 'flash' is unknown: choose auto, reference"),
        ("triton", {}, "'triton' needs Triton and a CUDA device, the tensors are on cpu"),
        ("blocked", {"device": "cuda"}, "'blocked' runs on CPU only, the tensors are on cuda"),
        ("dense", {}, "'dense' is full causal attention"),
        ("dense", {"window": 900, "separate_documents": True}, "no separate documents"),
        ("dense", {"window": 900, "sink": True}, "'dense' has no learned sink"),
        ("masked", {"sink": True}, "'masked' has no learned sink"),
        ("flex", {"sink": True, "needs_grad": False}, "'flex' has no learned sink"),
        ("flex", {}, "'flex' has no backward pass on CPU"),
    ],
)
def test_a_named_backend_that_cannot_do_the_job(backend: str, situation: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        select_backend(backend, **{"sequence_length": 800, "window": 64} | situation)


def test_the_op_refuses_what_selection_refuses() -> None:
    q = torch.zeros(1, 1, 8, 4, requires_grad=True)
    plan = build_plan(torch.zeros(1, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no backward pass on CPU"):
        sep_attention(q, q, q, plan, window=2, backend="flex")
    with pytest.raises(ValueError, match="full causal"):
        sep_attention(q, q, q, plan, window=2, backend="dense")


def _bad_calls() -> dict[str, tuple[dict, str]]:
    wide, narrow = torch.zeros(2, 4, 10, 8), torch.zeros(2, 2, 10, 8)
    strided = torch.zeros(2, 4, 8, 10).transpose(2, 3)
    return {
        "q-of-three-axes": ({"q": wide[0]}, r"q must be \[batch, heads, tokens, head dimension\], got \[4, 10, 8\]"),
        "head-dimension-strided": ({"q": strided}, "q's head dimension must be contiguous, its stride is 10"),
        "dtypes-differ": ({"k": narrow.double()}, "got torch.float32 and, for k, torch.float64"),
        "integers": ({"q": wide.int()}, "q, k and v must share one floating dtype"),
        "devices-differ": ({"v": narrow.to("meta")}, "q is on cpu but v is on meta"),
        "k-unlike-v": ({"v": narrow[:, :1]}, r"k is \[2, 2, 10, 8\] but v is \[2, 1, 10, 8\]"),
        "lengths-differ": ({"k": narrow[:, :, :9], "v": narrow[:, :, :9]}, "10 queries but 9 keys"),
        "no-query": ({"q": wide[:, :, :0]}, "0 queries but 10 keys"),
        "widths-differ": ({"q": wide[..., :4]}, r"\[2, 4, 10, 4\] but k is \[2, 2, 10, 8\]"),
        "heads-do-not-divide": ({"q": torch.zeros(2, 3, 10, 8)}, "3 query heads are not a multiple of 2 key-value"),
        "plan-of-another-batch": ({"plan": Case(length=10, batch=3).plan()}, "3 sequences of 10 tokens, k holds 2 of"),
        "plan-of-another-length": ({"plan": Case(length=12).plan()}, "2 sequences of 12 tokens, k holds 2 of 10"),
        "plan-on-another-device": ({"plan": Case(length=10).plan().to("meta")}, "the plan is on meta but q is on cpu"),
        "window-of-zero": ({"window": 0}, "window must be a whole number of at least 1 .*, got 0"),
        "window-of-a-half": ({"window": 0.5}, "window must be a whole number .*, got 0.5"),
        "horizon-of-zero": ({"horizons": [0]}, "a horizon must be a whole number of at least 1, got 0"),
        "horizons-too-many": ({"horizons": [5, 6]}, "the plan has 1 tiers but 2 horizons were given"),
        "sink-too-short": ({"sink": torch.zeros(2)}, r"sink must be \[4\], one logit per query head, got \[2\]"),
        "sink-elsewhere": ({"sink": torch.zeros(4, device="meta")}, "sink is on meta but q is on cpu"),
        "backend-unknown": ({"backend": "magic"}, "backend 'magic' is unknown"),
    }


@pytest.mark.parametrize("name", _bad_calls().keys())
def test_bad_input_to_the_op(name: str) -> None:
    change, sentence = _bad_calls()[name]
    narrow = torch.zeros(2, 2, 10, 8)
    good = {"q": torch.zeros(2, 4, 10, 8), "k": narrow, "v": narrow, "plan": Case(length=10).plan(), "window": 3}
    with pytest.raises(ValueError, match=sentence):
        sep_attention(**good | change)

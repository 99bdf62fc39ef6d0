"""Training through attn_implementation="sep" in one graph of torch.compile, and without waiting for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tests.hf.test_train_sep import configured, made  # noqa: E402
from tests.hf.tiny_models import left_padded, random_rows  # noqa: E402

# Up to 256 tokens the CPU backend is one masked call, beyond them the block loop.
LENGTHS = (60, 300)
FAMILIES = ("neox", "llama")


def batch(length: int, padded: bool) -> dict[str, Tensor]:
    ids, mask = left_padded(random_rows((length, length - 11)))
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "labels": labels} | ({"attention_mask": mask} if padded else {})


def gradients(model: Any, call: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = call(**inputs).loss
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def check(model: Any, backend: str, inputs: dict[str, Tensor]) -> None:
    torch._dynamo.reset()
    loss, wanted = gradients(model, model, inputs)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        again, found = gradients(model, compiled, inputs)
        torch.testing.assert_close(again, loss, atol=1e-6, rtol=1e-6)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph(family: str, length: int, padded: bool) -> None:
    check(made(family).train(), "aot_eager", batch(length, padded))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_graph_breaks(family: str) -> None:
    torch._dynamo.reset()
    explained = torch._dynamo.explain(made(family).train())(**batch(300, True))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
    called = [str(node.target) for graph in explained.graphs for node in graph.graph.nodes]
    assert sum("sep_attention.blocked_forward" in name for name in called) == 2
    assert sum("sep_attention.plan" in name for name in called) == 1


@pytest.mark.slow
def test_gradient_checkpointing_is_compiled_too() -> None:
    model = made("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check(model, "aot_eager", batch(300, False))


@pytest.mark.slow
def test_padding_between_tokens_is_refused_there_too() -> None:
    torch._dynamo.reset()
    inputs = batch(60, True)
    inputs["attention_mask"][0, 4] = 0
    compiled = torch.compile(made("llama").train(), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="padding between its tokens: pad on one side"):
        compiled(**inputs)


@pytest.mark.slow
def test_one_graph_for_all_lengths() -> None:
    torch._dynamo.reset()
    model = made("llama").train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for length in (300, 310, 420):
        loss, _ = gradients(model, model, batch(length, True))
        torch.testing.assert_close(gradients(model, compiled, batch(length, True))[0], loss, atol=1e-6, rtol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_inductor(family: str, compile_cache: None) -> None:
    check(made(family).train(), "inductor", batch(300, True))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_is_read(family: str, padded: bool) -> None:
    """Forward and backward on tensors without values, of which reading one raises."""
    config, inputs = configured(family), batch(300, padded)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sep").train()
        loss = model(**{name: fake.from_tensor(tensor) for name, tensor in inputs.items()}).loss
        loss.backward()
        with pytest.raises(DataDependentOutputException):
            loss.item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_training_on_a_gpu_waits_for_nothing(compiled: bool) -> None:
    model = made("llama").train().cuda()
    inputs = {name: tensor.cuda() for name, tensor in batch(300, True).items()}
    call = torch.compile(model, fullgraph=True) if compiled else model
    for _ in range(2):
        call(**inputs).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(**inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

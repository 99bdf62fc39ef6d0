"""Training through attn_implementation="sep" in one graph of torch.compile, and without waiting for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.hf.test_train_sep import made
from tests.hf.tiny_models import left_padded, random_rows

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


def test_gradient_checkpointing_is_compiled_too() -> None:
    model = made("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check(model, "aot_eager", batch(300, False))


def test_one_graph_for_all_lengths() -> None:
    torch._dynamo.reset()
    model = made("llama").train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (300, 310, 420):
        loss, _ = gradients(model, model, batch(length, True))
        torch.testing.assert_close(gradients(model, compiled, batch(length, True))[0], loss, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_inductor(family: str, compile_cache: None) -> None:
    check(made(family).train(), "inductor", batch(300, True))


class Transfers(TorchDispatchMode):
    """Collects operations whose results are on another device than their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves
        devices = {
            leaf.device.type for leaf in leaves((args, kwargs, result)) if isinstance(leaf, Tensor) and leaf.dim()
        }
        if len(devices) > 1:
            self.found.append(str(function))
        return result


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_waits_for_a_gpu(family: str, padded: bool) -> None:
    """Shown on tensors of a CUDA device without values: reading one would raise, and so would a kernel's launch.

    The kernels are ops of the graph here as under torch.compile; that their launches wait for nothing is tested where
    there is a GPU.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    with FakeTensorMode():
        model = made(family).train().to("cuda")
        inputs = {name: tensor.to("cuda") for name, tensor in batch(300, padded).items()}
        # What the first forward puts on the device stays there.
        model(**inputs).loss.backward()
        with Transfers() as transfers:
            loss = model(**inputs).loss
            loss.backward()
        assert not transfers.found
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            loss.item()

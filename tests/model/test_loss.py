"""The cross entropy over chunks of tokens against the plain one, and what it keeps in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sepllm_train.model.build import build_model
from tests.model.tiny import LENGTH, LLAMA, PYTHIA, VOCABULARY, micro_batch, tiny_config

PADDED = 128
TOKENS = 2 * LENGTH


class Sizes(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = (leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.largest = max(self.largest, *sizes, 0)
        return result


def outcome(model: dict[str, Any], training: dict[str, Any], device: torch.device, scale: float = 1.0) -> Any:
    """Losses [B, S] and gradients of the weights, of a sum in which each token has another weight, some none."""
    config = tiny_config(model, training=training)
    gpt = build_model(config, VOCABULARY).to(device)
    if scale != 1.0:
        with torch.no_grad():
            gpt.output_layer.weight.mul_(scale)
    data = micro_batch(config, device=device)
    loss = gpt(data.tokens, data.plan, labels=data.labels)
    (loss * torch.linspace(-0.5, 1.0, TOKENS, device=device).clamp_min(0).view_as(loss)).sum().backward()
    return loss.detach(), {name: parameter.grad for name, parameter in gpt.named_parameters()}


# 31 leaves chunks of unequal sizes; 1000 is more than there are tokens.
@pytest.mark.parametrize("chunk", [1, 31, 48, 1000])
@pytest.mark.parametrize("model", [PYTHIA, LLAMA | {"tied_embeddings": True}], ids=["untied", "tied"])
def test_chunked_equals_plain(model: dict[str, Any], chunk: int, device: torch.device) -> None:
    plain, expected = outcome(model, {}, device)
    loss, gradients = outcome(model, {"loss_chunk": chunk}, device)
    assert loss.dtype == torch.float32 and loss.shape == (2, LENGTH) and loss.is_contiguous()
    torch.testing.assert_close(loss, plain, rtol=0, atol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("chunk", [20, 1000])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_as_near_to_fp32_as_plain(precision: str, chunk: int, device: torch.device) -> None:
    _, exact = outcome(PYTHIA, {}, device)
    plain_loss, plain = outcome(PYTHIA, {"precision": precision}, device)
    loss, chunked = outcome(PYTHIA, {"precision": precision, "loss_chunk": chunk}, device)
    torch.testing.assert_close(loss, plain_loss, rtol=0, atol=2e-6)
    for name in ("output_layer.weight", "decoder.final_layernorm.weight", "embedding.word_embeddings.weight"):
        errors = [(gradients[name].float() - exact[name]).norm() for gradients in (chunked, plain)]
        assert chunked[name].dtype == plain[name].dtype
        assert 0 < errors[0] < 1.1 * errors[1] < 0.1 * exact[name].norm(), name


def test_logits_that_overflow_an_exponential(device: torch.device) -> None:
    """Without the maximum taken off, exp of these is infinite."""
    plain, expected = outcome(PYTHIA, {}, device, scale=2000.0)
    loss, gradients = outcome(PYTHIA, {"loss_chunk": 20}, device, scale=2000.0)
    assert plain.max() > 100
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-3)
    weight = "output_layer.weight"
    torch.testing.assert_close(gradients[weight], expected[weight], rtol=1e-3, atol=1e-5)


def test_padding_has_no_probability_and_no_gradient(device: torch.device) -> None:
    config = tiny_config(training={"loss_chunk": 20})
    gpt = build_model(config, VOCABULARY).to(device)
    data = micro_batch(config, device=device)
    weight = gpt.output_layer.weight
    with torch.no_grad():
        weight[VOCABULARY:] = 100.0
    loss = gpt(data.tokens, data.plan, labels=data.labels)
    loss.mean().backward()
    assert loss.max() < 20
    assert weight.grad[VOCABULARY:].abs().max() == 0
    assert (weight.grad[:VOCABULARY].abs().sum(-1) > 0).all()


@pytest.mark.parametrize(("chunk", "whole"), [(0, True), (8, False)])
def test_logits_are_never_whole(chunk: int, whole: bool, device: torch.device) -> None:
    small = {"layers": 1, "hidden": 16, "heads": 2, "ffn": 16}
    config = tiny_config(small, training={"loss_chunk": chunk})
    gpt = build_model(config, 8 * PADDED).to(device)
    data = micro_batch(config, device=device)
    with Sizes() as sizes:
        gpt(data.tokens, data.plan, labels=data.labels).mean().backward()
    # The output layer's own gradient is as large as 16 tokens' logits.
    assert (sizes.largest >= TOKENS * 8 * PADDED) == whole
    assert whole or sizes.largest == 16 * 8 * PADDED

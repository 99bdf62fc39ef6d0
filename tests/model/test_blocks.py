"""The two families of blocks against models written out by hand, with the same weights."""

from __future__ import annotations

import pytest
import torch

from sepllm_train.model.build import build_model
from tests.model.handwritten import llama_logits, neox_logits, separator_mask
from tests.model.tiny import LENGTH, LLAMA, PYTHIA, VOCABULARY, micro_batch, tiny_config

PATTERNS = {
    "dense": ({"pattern": "dense"}, [LENGTH] * 4),
    "sep": ({"window": 4}, [4] * 4),
    "sep, first and last layer full": ({"window": 4, "full_layers": "first_last"}, [LENGTH, 4, 4, LENGTH]),
    "sep, a window per layer": ({"window": [1, 3, 9, 27]}, [1, 3, 9, 27]),
}
FAMILIES = {
    "pythia": (PYTHIA, neox_logits),
    "llama": (LLAMA, llama_logits),
    "llama, tied": (LLAMA | {"tied_embeddings": True}, llama_logits),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_handwritten_model(family: str, pattern: str, device: torch.device) -> None:
    shape, handwritten = FAMILIES[family]
    attention, windows = PATTERNS[pattern]
    config = tiny_config(shape, attention)
    model = build_model(config, VOCABULARY).to(device)
    with torch.no_grad():
        # Weights of one and biases of zero would hide a norm or a bias that is left out.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.linspace(-0.3, 0.3, len(parameter), device=device))
    data = micro_batch(config, device=device)
    weights = {name: weight.detach().cpu() for name, weight in model.named_parameters()}
    visible = [separator_mask(data.classes.cpu(), 2, window) for window in windows]
    with torch.no_grad():
        logits = model(data.tokens, data.plan)[..., :VOCABULARY].cpu()
    expected = handwritten(weights, config.model, data.tokens.cpu(), visible)[..., :VOCABULARY]
    assert expected.std() > 0.05
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["pythia", "llama"])
def test_loss_is_the_cross_entropy_of_the_logits(family: str, device: torch.device) -> None:
    config = tiny_config(FAMILIES[family][0])
    model = build_model(config, VOCABULARY).to(device)
    data = micro_batch(config, device=device)
    with torch.no_grad():
        logits = model(data.tokens, data.plan)[..., :VOCABULARY]
        loss = model(data.tokens, data.plan, labels=data.labels)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data.labels.flatten(), reduction="none")
    torch.testing.assert_close(loss.flatten(), expected, rtol=0, atol=1e-5)


def test_query_and_key_norm_is_applied_per_head(device: torch.device) -> None:
    config = tiny_config(attention={"qk_norm": True})
    model = build_model(config, VOCABULARY).to(device)
    norm = model.decoder.layers[0].self_attention.q_layernorm
    seen: list[torch.Tensor] = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    data = micro_batch(config, device=device)
    model(data.tokens, data.plan, labels=data.labels).mean().backward()
    assert seen[0].shape == (LENGTH, 2, 4, 16)
    torch.testing.assert_close(
        seen[0].var(-1, correction=0).mean(), torch.tensor(1.0, device=device), rtol=0, atol=0.02
    )
    assert norm.weight.grad.abs().sum() > 0

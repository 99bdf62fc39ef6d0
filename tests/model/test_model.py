"""Properties of the whole model: padding of the vocabulary, documents, sinks, recompute, wrong shapes."""

from __future__ import annotations

import pytest
import torch

from sepllm_train.base.errors import UserError
from sepllm_train.model.build import build_model, padded_vocabulary, transformer_config
from tests.model.tiny import LENGTH, LLAMA, PYTHIA, VOCABULARY, micro_batch, planned, tiny_config


@pytest.mark.parametrize(
    ("entries", "tensor", "padded"),
    [(1, 1, 128), (128, 1, 128), (129, 1, 256), (50277, 1, 50304), (50277, 2, 50432), (50304, 4, 50688)],
)
def test_vocabulary_is_padded_to_a_multiple_of_128_per_tensor_rank(entries: int, tensor: int, padded: int) -> None:
    assert padded_vocabulary(entries, tensor) == padded


@pytest.mark.parametrize("tied", [False, True])
def test_padding_has_no_probability_and_no_gradient(tied: bool, device: torch.device) -> None:
    config = tiny_config(PYTHIA | {"tied_embeddings": tied})
    model = build_model(config, VOCABULARY).to(device)
    data = micro_batch(config, device=device)
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    assert weight.shape[0] == 128
    with torch.no_grad():
        # Were the padding in the softmax, such rows would take nearly all of the probability.
        weight[VOCABULARY:] = 100.0
    assert model(data.tokens, data.plan).softmax(-1)[..., VOCABULARY:].sum() == 0
    loss = model(data.tokens, data.plan, labels=data.labels)
    loss.mean().backward()
    assert loss.max() < 20
    assert weight.grad is not None
    assert weight.grad[VOCABULARY:].abs().max() == 0
    assert weight.grad[:VOCABULARY].abs().sum() > 0


def test_gradient_through_returned_logits_leaves_the_padding_alone(device: torch.device) -> None:
    config = tiny_config()
    model = build_model(config, VOCABULARY).to(device)
    data = micro_batch(config, batch=1, device=device)
    logits = model(data.tokens, data.plan)
    assert torch.isinf(logits[..., VOCABULARY:]).all()
    logits.logsumexp(-1).sum().backward()
    assert model.output_layer.weight.grad[VOCABULARY:].abs().max() == 0


def test_changing_a_document_leaves_the_logits_of_the_others_bitwise(device: torch.device) -> None:
    config = tiny_config(attention={"separate_documents": True, "full_layers": "first", "sink": "learned"})
    model = build_model(config, VOCABULARY).to(device)
    data = micro_batch(config, device=device)
    tokens = torch.cat((data.tokens, data.labels[:, -1:]), 1).cpu()
    changed = tokens.clone()
    changed[:, 17:34] = (changed[:, 17:34] + 1) % VOCABULARY
    other = planned(config, changed, data.classes, data.document_start, device)
    with torch.no_grad():
        before = model(data.tokens, data.plan)[..., :VOCABULARY]
        after = model(other.tokens, other.plan)[..., :VOCABULARY]
    outside = torch.tensor([*range(17), *range(34, LENGTH)], device=device)
    assert torch.equal(before[:, outside], after[:, outside])
    assert not torch.equal(before[:, 17:34], after[:, 17:34])


def test_joined_documents_do_see_each_other(device: torch.device) -> None:
    config = tiny_config(attention={"window": LENGTH})
    model = build_model(config, VOCABULARY).to(device)
    data = micro_batch(config, device=device)
    changed = data.tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = (model(t, data.plan)[..., :VOCABULARY] for t in (data.tokens, changed))
    assert not torch.equal(before[:, -1], after[:, -1])
    assert torch.equal(before[:, :20], after[:, :20])


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_sink_takes_probability_and_has_a_gradient(recompute: str, device: torch.device) -> None:
    config = tiny_config(attention={"sink": "learned"}, training={"recompute": recompute})
    model = build_model(config, VOCABULARY).to(device)
    data = micro_batch(config, device=device)
    sinks = [layer.self_attention.core_attention.sink for layer in model.decoder.layers]
    loss = model(data.tokens, data.plan, labels=data.labels).mean()
    loss.backward()
    for sink in sinks:
        assert sink.shape == (4,)
        assert (sink.grad.abs() > 0).all()
    with torch.no_grad():
        for sink in sinks:
            sink.fill_(-1e9)
        closed = model(data.tokens, data.plan, labels=data.labels).mean()
        plain = build_model(tiny_config(), VOCABULARY).to(device)
        without = plain(data.tokens, data.plan, labels=data.labels).mean()
    torch.testing.assert_close(closed, without, rtol=0, atol=1e-6)
    assert abs(loss - without) > 1e-4


@pytest.mark.parametrize("model", [PYTHIA, LLAMA], ids=["pythia", "llama"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_gradient(recompute: str, model: dict, device: torch.device) -> None:
    gradients = []
    for mode in ("none", recompute):
        config = tiny_config(model, {"sink": "learned"}, training={"recompute": mode})
        gpt = build_model(config, VOCABULARY).to(device)
        data = micro_batch(config, device=device)
        gpt(data.tokens, data.plan, labels=data.labels).mean().backward()
        gradients.append({name: parameter.grad for name, parameter in gpt.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_loss_is_near_the_fp32_one(precision: str, device: torch.device) -> None:
    losses = []
    for kind in ("fp32", precision):
        config = tiny_config(attention={"sink": "learned"}, training={"precision": kind})
        model = build_model(config, VOCABULARY).to(device)
        data = micro_batch(config, device=device)
        loss = model(data.tokens, data.plan, labels=data.labels)
        assert loss.dtype == torch.float32
        losses.append(loss.mean())
    assert {p.dtype for p in model.parameters()} == {getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[precision])}
    assert abs(losses[0] - losses[1]) < 0.02


def test_odd_number_of_rotary_features_is_refused() -> None:
    with pytest.raises(UserError, match=r"rotary_fraction=0\.2 of 16 features per head gives 3"):
        transformer_config(tiny_config(PYTHIA | {"rotary_fraction": 0.2}))


def test_model_without_rotary_embedding_runs(device: torch.device) -> None:
    config = tiny_config(PYTHIA | {"rotary_fraction": 0.0})
    model = build_model(config, VOCABULARY).to(device)
    data = micro_batch(config, device=device)
    assert torch.isfinite(model(data.tokens, data.plan, labels=data.labels)).all()


def test_pattern_that_does_not_fit_the_model_is_refused(device: torch.device) -> None:
    with pytest.raises(UserError, match="lists 3 windows for a model of 4 layers"):
        build_model(tiny_config(attention={"window": [1, 2, 3]}), VOCABULARY)

"""Documents that are packed into a sequence: with separate attention, restarted positions and masked boundaries each is
what it is alone, and a step's loss is the mean over the labels that count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import OptimConfig
from sepllm_train.config.validate import validate
from sepllm_train.data.loader import Batch
from sepllm_train.model.build import build_model
from sepllm_train.model.pattern import AttentionPattern, resolve_pattern
from sepllm_train.training.schedules import cut
from sepllm_train.training.setup import build_training
from sepllm_train.training.step import Stepper, StepResult
from tests.model.tiny import LENGTH, LLAMA, PYTHIA, VOCABULARY, tiny_config

# Lengths of the documents of each row: of a sequence and the label after it, which is of the row's last document.
ROWS = [[7, 1, 1, 20, 15, 5], [LENGTH - 3, 4], [LENGTH, 1]]
APART = {"separate_documents": True, "restart_positions": True}
# What a document is alone holds for every pattern whose tiers follow from the tokens and their place in the document.
PATTERNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": (PYTHIA, {"pattern": "dense"}),
    "sep": (PYTHIA, {}),
    "initial tokens of each document": (PYTHIA, {"initial_tokens": 5, "window": 1}),
    "tiers, windows, a full layer, sinks": (
        LLAMA,
        {
            "window": [1, 3, 9, 27],
            "full_layers": [1],
            "sink": "learned",
            "separators": [{"classes": ["period"], "horizon": 12}, {"classes": ["comma"], "horizon": "forever"}],
        },
    ),
    "streaming": (LLAMA, {"pattern": "streaming"}),
}


def packed(seed: int = 0, rows: list[list[int]] = ROWS) -> Batch:
    """Sequences of documents of these lengths, with the entries that the data loader gives."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, VOCABULARY, (len(rows), LENGTH + 1), generator=generator)
    classes = torch.randint(0, 3, (len(rows), LENGTH), generator=generator) * (
        torch.rand(len(rows), LENGTH, generator=generator) < 0.3
    )
    starts = []
    for lengths in rows:
        assert sum(lengths) == LENGTH + 1
        ends = torch.tensor(lengths).cumsum(0)
        starts.append((ends - torch.tensor(lengths)).repeat_interleave(torch.tensor(lengths)))
    start = torch.stack(starts).int()
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "separator_class": classes.to(torch.uint8),
        "document_start": start[:, :-1].contiguous(),
        "loss_mask": start[:, 1:] == start[:, :-1],
        "counted": torch.ones(len(rows)),
    }


def losses_of(model: Any, pattern: AttentionPattern, batch: Batch) -> Tensor:
    """Losses [B, S] of a packed batch."""
    plan = pattern.plan(batch["separator_class"], batch["document_start"])
    positions = pattern.positions(batch["document_start"])
    return model(batch["tokens"], plan, labels=batch["labels"], positions=positions)


def one_by_one(model: Any, pattern: AttentionPattern, batch: Batch) -> Iterator[tuple[int, slice, Tensor]]:
    """(row, places, losses of the labels that are its own) of each document, fed alone as a sequence of its own."""
    for row, starts in enumerate(batch["document_start"].tolist()):
        for start in sorted(set(starts)):
            stop = start + starts.count(start)
            alone = {key: entry[row : row + 1, start:stop] for key, entry in batch.items() if entry.dim() == 2}
            plan = pattern.plan(alone["separator_class"], torch.zeros_like(alone["document_start"]))
            # The last label is of another document, or of this one beyond the sequence.
            own = int(alone["loss_mask"].sum())
            assert own >= stop - start - 1 and alone["loss_mask"][0, :own].all()
            losses = model(alone["tokens"], plan, labels=alone["labels"])[0, :own]
            yield row, slice(start, start + own), losses


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("chunk", [0, 40])
def test_packed_documents_are_those_one_by_one(name: str, chunk: int, device: torch.device) -> None:
    model, attention = PATTERNS[name]
    config = tiny_config(model, attention | APART, training={"loss_chunk": chunk})
    pattern = resolve_pattern(config.attention, config.model.layers)
    gpt, batch = build_model(config, VOCABULARY).to(device), to(packed(), device)
    losses, mask = losses_of(gpt, pattern, batch), batch["loss_mask"]
    alone = torch.full_like(losses, torch.nan)
    parts = []
    for row, places, own in one_by_one(gpt, pattern, batch):
        alone[row, places] = own.detach()
        parts.append(own)
    assert torch.equal(alone.isnan(), ~mask) and len(parts) == 6 + 2 + 1
    torch.testing.assert_close(losses[mask], alone[mask], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        gradients(gpt, losses[mask].mean()), gradients(gpt, torch.cat(parts).mean()), rtol=0, atol=1e-5
    )
    # Rotary attention depends on distances: without keys of other documents, positions of the sequence do as well.
    running = losses_of(gpt, replace(pattern, restart_positions=False), batch)
    assert not torch.equal(running, losses)
    torch.testing.assert_close(running, losses, rtol=0, atol=1e-5)
    # Attention across documents does not.
    joined = losses_of(gpt, replace(pattern, separate_documents=False), batch)
    assert (joined - losses)[0, 9:].abs().max() > 1e-4


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of each weight."""
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), materialize_grads=True), strict=True))


def to(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return {key: entry.to(device) for key, entry in batch.items()}


def test_positions_restart_without_separate_documents(device: torch.device) -> None:
    """Attention goes on across documents: a query's distance to a key is that of their places in their documents."""
    config = tiny_config(attention={"pattern": "dense", "restart_positions": True})
    pattern = resolve_pattern(config.attention, config.model.layers)
    model, batch = build_model(config, VOCABULARY).to(device), to(packed(), device)
    assert pattern.dense and pattern.positions(batch["document_start"])[0, :12].tolist() == [*range(7), 0, 0, 0, 1, 2]
    positions = pattern.positions(batch["document_start"])
    plan = pattern.plan(batch["separator_class"], batch["document_start"])
    cos, sin = model._rotation(plan, positions)
    assert cos.shape == (LENGTH, 3, 1, 4)
    angles = positions.t()[..., None] * 10000.0 ** -torch.tensor([0, 0.5], device=device)
    torch.testing.assert_close(cos[:, :, 0, :2], angles.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sin[:, :, 0, 2:], angles.sin(), rtol=0, atol=1e-5)
    losses = losses_of(model, pattern, batch)
    # The first document is where it was, the others are not; nor are they what they would be alone.
    plain = losses_of(model, replace(pattern, restart_positions=False), batch)
    assert torch.equal(losses[0, :7], plain[0, :7]) and (losses - plain)[0, 9:].abs().max() > 1e-4
    apart = replace(pattern, separate_documents=True)
    assert (losses - losses_of(model, apart, batch))[0, 9:].abs().max() > 1e-4


def test_positions_and_masks_of_pieces_of_a_sample() -> None:
    """A curriculum cuts a sample: a document that goes on begins anew, and the mask stays with its labels."""
    pattern = resolve_pattern(tiny_config(attention=APART).attention, 4)
    batch = packed()
    pieces = cut(batch | {"counted": torch.ones(2, LENGTH)}, LENGTH // 4)
    assert pieces["loss_mask"].flatten().tolist() == batch["loss_mask"].flatten().tolist()
    positions = pattern.positions(pieces["document_start"])
    assert positions is not None and pieces["loss_mask"].shape == positions.shape
    assert positions[0].tolist() == [*range(7), 0, 0, 0, 1, 2]
    assert positions[1].tolist() == [*range(12)] and positions[2].tolist() == [*range(5), *range(7)]


def stepped(device: torch.device, batches: list[Batch], precision: str = "fp32") -> tuple[StepResult, Stepper]:
    """A step of a new model over micro-batches, which masks what their loss masks mask."""
    training = {"micro_batch": len(batches[0]["tokens"]), "precision": precision}
    config = tiny_config(attention=APART, training=training)
    config.optim = OptimConfig(
        lr=1e-2, min_lr=0.0, epsilon=1e-3, schedule="constant", warmup_fraction=0.0, clip_grad=0.0
    )
    config = replace(config, data=replace(config.data, mask_boundary_loss=True))
    stepper = Stepper(
        config,
        resolve_pattern(config.attention, config.model.layers),
        build_training(config, VOCABULARY, device),
        device,
    )
    result = stepper.train([iter(batches)], len(batches), lambda number: None)
    return result, stepper


def weights(stepper: Stepper) -> dict[str, Tensor]:
    """The weights of the one model chunk."""
    return dict(stepper.training.modules[0].named_parameters())


def rows_of(batch: Batch, size: int) -> list[Batch]:
    """A batch as micro-batches of `size` sequences."""
    count = len(batch["tokens"])
    return [{key: entry[i : i + size] for key, entry in batch.items()} for i in range(0, count, size)]


# Of 1 to 48 labels a sequence, and of none in one.
MANY = [[LENGTH + 1], [1] * (LENGTH + 1), *ROWS, [3] * 13 + [10], [1] * 40 + [9], [24, 25]]


def test_the_loss_of_a_step_is_the_mean_over_the_labels_that_count(device: torch.device) -> None:
    """Also when micro-batches have unequal counts of them: loss, gradient norm and update are those of one mean."""
    batch = to(packed(1, MANY), device)
    mask = batch["loss_mask"]
    counts = mask.sum(1).tolist()
    assert counts[:2] == [LENGTH, 0] and len(set(counts)) > 5
    whole, stepper = stepped(device, [batch])
    nothing, other = stepped(device, [batch | {"loss_mask": torch.zeros_like(mask)}])
    assert nothing.mean_loss == nothing.grad_norm == float(nothing.counted) == 0
    assert all(weight.isfinite().all() for weight in weights(other).values())
    model = build_model(stepper.config, VOCABULARY).to(device)
    losses = losses_of(model, stepper.pattern, batch)
    expected, losses = gradients(model, losses[mask].mean()), losses.detach()
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    assert whole.mean_loss == pytest.approx(float(losses[mask].mean()), abs=1e-6)
    assert whole.mean_loss != pytest.approx(float(losses.mean()), abs=1e-4)
    assert whole.grad_norm == pytest.approx(float(norm), rel=1e-5)
    # What the optimizer was given, which is not clipped here.
    given = {name: weight.main_grad for name, weight in weights(stepper).items()}
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-6)
    assert float(whole.counted) == pytest.approx(sum(counts) / mask.numel(), abs=1e-12)
    for size in (1, 2):
        split, other = stepped(device, rows_of(batch, size))
        assert split.mean_loss == pytest.approx(whole.mean_loss, abs=1e-6)
        assert split.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
        torch.testing.assert_close(weights(other), weights(stepper), rtol=0, atol=1e-6)
    unmasked, _ = stepped(device, [{key: entry for key, entry in batch.items() if key != "loss_mask"}])
    assert unmasked.mean_loss == pytest.approx(float(losses.mean()), abs=1e-6) and float(unmasked.counted) == 1


def test_masks_of_ones_change_nothing(device: torch.device) -> None:
    batch = to(packed(2, [[LENGTH + 1], [LENGTH + 1]]), device)
    assert batch["loss_mask"].all()
    masked, stepper = stepped(device, rows_of(batch, 1))
    plain, other = stepped(device, rows_of({key: e for key, e in batch.items() if key != "loss_mask"}, 1))
    assert (masked.mean_loss, masked.grad_norm) == (plain.mean_loss, plain.grad_norm)
    assert all(torch.equal(one, weights(other)[name]) for name, one in weights(stepper).items())


def test_fp16_scales_with_the_labels_that_count(device: torch.device) -> None:
    """Most labels masked: the loss scale and the share of labels do not multiply into an overflow."""
    batch = to(packed(3, [[1] * 40 + [9], [1] * 45 + [4]]), device)
    half, _ = stepped(device, rows_of(batch, 1), "fp16")
    whole, _ = stepped(device, rows_of(batch, 1))
    assert not half.skipped and half.mean_loss == pytest.approx(whole.mean_loss, abs=0.02)
    assert half.grad_norm == pytest.approx(whole.grad_norm, rel=0.05)


def test_validation_leaves_masked_labels_out(device: torch.device) -> None:
    """Of loss and of bytes; a filled-up sample counts neither."""
    batch = to(packed(4), device)
    _, stepper = stepped(device, [batch])
    batch["counted"][1:] = 0
    # The end of a document takes a byte of the label after it back, which is not there to be taken back from.
    sizes = torch.arange(VOCABULARY, device=device)
    end = int(batch["labels"][0][batch["loss_mask"][0]][0])
    sizes[end] = 0
    given = sizes.clone()
    given[end] = -1
    with torch.no_grad():
        losses = losses_of(stepper.training.modules[0].eval(), stepper.pattern, batch)[0]
    own = batch["loss_mask"][0]
    nats, per_byte = stepper.validate([iter([batch])], 1, given)
    assert nats == pytest.approx(float(losses[own].mean()), abs=1e-6)
    assert per_byte == pytest.approx(float(losses[own].sum() / sizes[batch["labels"][0][own]].sum()), rel=1e-6)
    nothing = batch | {"loss_mask": torch.zeros_like(batch["loss_mask"])}
    assert all(value != value for value in stepper.validate([iter([nothing])], 1, sizes))


def test_restarted_positions_need_a_rotary_embedding() -> None:
    config = tiny_config(PYTHIA | {"rotary_fraction": 0.0}, {"restart_positions": True})
    with pytest.raises(UserError, match=r"restart_positions=true restarts rotary positions, of which .* has none"):
        validate(config, 1)

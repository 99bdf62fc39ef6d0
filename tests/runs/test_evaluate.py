"""Losses of a trained run: under the pattern of training they are those that it logged."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from sep_attention import visible_mask

from sepllm_train.analysis.losses import LossAnalysis, LossOptions
from sepllm_train.base.statistics import token_mean
from sepllm_train.config.schema import AttentionConfig
from sepllm_train.model.pattern import resolve_pattern
from sepllm_train.runs.evaluate import core_attentions, evaluate, evaluate_run, far_recall
from sepllm_train.runs.held_out import Pieces, TakingTurns, text_of
from sepllm_train.runs.open import TrainedRun, open_run
from sepllm_train.runs.variations import (
    base_attention,
    dense_pattern,
    equal_pairs_without_separators,
    pairs_of,
    with_window,
    without_classes,
)
from tests.analysis.conftest import Trained

SAMPLES = 5


def logged(trained: Trained) -> float:
    """Validation loss after the last step."""
    return [record["val/loss"] for record in trained.records if "val/loss" in record][-1]


def test_pattern_of_training_gives_the_logged_loss(run: TrainedRun, trained: Trained) -> None:
    losses = evaluate(run.model, run.pattern, run.validation, SAMPLES)
    assert losses.nats.shape == (SAMPLES, 128)
    assert float(losses.nats.double().mean()) == pytest.approx(logged(trained), rel=1e-6)


def test_evaluate_run_tells_what_others_need(run: TrainedRun, trained: Trained) -> None:
    """The same figures through the one call, worked out here from the losses of the tokens."""
    found = evaluate_run(open_run(trained.folder), samples=SAMPLES)
    losses = evaluate(run.model, run.pattern, run.validation, SAMPLES).nats.double()
    text = text_of(run.validation, SAMPLES)
    far = far_recall(text["tokens"], text["labels"], 16)
    assert found["recall_window"] == 16 and found["samples"] == SAMPLES and found["tokens"] == SAMPLES * 128
    assert found["loss"] == pytest.approx(logged(trained), rel=1e-6)
    assert found["loss_error"] == pytest.approx(float(losses.mean(1).std()) / math.sqrt(SAMPLES), rel=1e-6)
    assert found["far_recall_loss"] == pytest.approx(float(losses[far].mean()), rel=1e-6)
    assert found["other_loss"] == pytest.approx(float(losses[~far].mean()), rel=1e-6)
    assert 0 < found["far_recall_share"] == pytest.approx(float(far.double().mean()))
    plan = run.pattern.plan(text["separator_class"], text["document_start"])
    pairs = sum(int(visible_mask(plan, layer.window, layer.horizons).sum()) for layer in run.pattern.layers)
    assert found["attended_share"] == pytest.approx(pairs / (SAMPLES * 2 * 128 * 129 / 2))
    assert found["checkpoint"]["step"] == 4 and found["checkpoint"]["tokens"] == 4 * 4 * 128
    json.dumps(found)


def test_an_earlier_checkpoint_is_another_model(trained: Trained) -> None:
    early, late = (evaluate_run(open_run(trained.folder, step), samples=2) for step in (2, 4))
    assert early["checkpoint"]["step"] == 2 and early["loss"] > late["loss"]
    assert early["checkpoint"]["manifest_sha256"] != late["checkpoint"]["manifest_sha256"]


def test_another_pattern_is_taken_back(run: TrainedRun) -> None:
    before = evaluate(run.model, run.pattern, run.validation, 2)
    dense = evaluate(run.model, dense_pattern(run.config.attention, 2), run.validation, 2)
    assert dense.attended_share == 1 > before.attended_share
    assert not torch.equal(dense.nats, before.nats)
    assert torch.equal(evaluate(run.model, run.pattern, run.validation, 2).nats, before.nats)
    broken = without_classes(run.pattern, [1])
    with pytest.raises(RuntimeError, match="stop"):
        evaluate(run.model, broken, run.validation, 1, advance=_stop)
    assert [core.layer for core in core_attentions(run.model)] == list(run.pattern.layers)


def _stop() -> None:
    raise RuntimeError("stop")


def test_dropping_a_class_is_configuring_without_it(run: TrainedRun) -> None:
    analysis = LossAnalysis(run, LossOptions(drop_classes=True), SAMPLES)
    result = analysis.answer(lambda: None)
    base = evaluate(run.model, run.pattern, run.validation, SAMPLES)
    rows = {row["class"]: row for row in result["classes"]}
    assert rows.keys() == {"period", "comma", "newline", "all of them"}
    for left_out, row in rows.items():
        kept = [name for name in ("period", "comma", "newline") if name != left_out and left_out != "all of them"]
        change: dict[str, Any] = {"separators": kept} if kept else {"pattern": "streaming"}
        pattern = resolve_pattern(replace(run.config.attention, **change), 2)
        without = evaluate(run.model, pattern, run.validation, SAMPLES)
        difference = (without.nats - base.nats).double()
        assert row["change"].mean == pytest.approx(float(difference.mean()), abs=1e-12)
        assert row["change"].error == pytest.approx(float(difference.mean(1).std()) / math.sqrt(SAMPLES), rel=1e-6)
        removed = int((base.pairs - without.pairs).sum())
        assert removed > 0
        assert row["removed_pairs_per_token"] == removed / base.nats.numel()
        assert row["attended_share_lost"] == pytest.approx(removed / (SAMPLES * base.causal_pairs))
        assert row["per_thousand_pairs"].mean == pytest.approx(1000 * float(difference.sum()) / removed, rel=1e-6)


def test_lengths_and_windows(run: TrainedRun) -> None:
    """Pieces of 32 tokens: the same tokens as whole samples, each piece seeing itself alone."""
    questions = LossOptions(windows=[4, 200], lengths=[32, 128], far_recall=True)
    rows = LossAnalysis(run, questions, SAMPLES).answer(lambda: None)["sweep"]
    assert [(row["length"], row["window"]) for row in rows] == [(32, 4), (32, 200), (128, 4), (128, 200)]
    pieces = Pieces(run.validation, 32)
    alone = evaluate(run.model, with_window(run.pattern, 4), [pieces[4 * SAMPLES - 1]], 1).nats
    whole = evaluate(run.model, with_window(run.pattern, 4), pieces, 4 * SAMPLES)
    assert torch.equal(whole.nats[-1:], alone)
    assert rows[0]["loss"].mean == pytest.approx(float(whole.nats.double().mean()), rel=1e-9)
    assert rows[0]["loss"].error == pytest.approx(token_mean(whole.nats.view(SAMPLES, -1)).error, rel=1e-9)
    assert torch.equal(
        text_of(pieces, 4 * SAMPLES)["labels"].view(SAMPLES, -1), text_of(run.validation, SAMPLES)["labels"]
    )
    assert rows[1]["attended_share"] == rows[3]["attended_share"] == 1 and "equal_loss" not in rows[3]
    assert rows[2]["attended_share"] == pytest.approx(rows[2]["equal_share"], abs=0.02)
    gain = rows[2]["equal_loss"].mean - rows[2]["loss"].mean
    assert rows[2]["separators_gain"].mean == pytest.approx(gain, abs=1e-9)


@pytest.mark.parametrize("attention", [{}, {"full_layers": "first"}, {"separate_documents": True}])
def test_equal_pairs_are_the_nearest_there_are(run: TrainedRun, attention: dict[str, Any]) -> None:
    text = text_of(run.validation, 3)
    pattern = with_window(resolve_pattern(AttentionConfig(window=8, **attention), 2), 8)
    bare, window = equal_pairs_without_separators(pattern, text)
    wanted = pairs_of(pattern, text)
    distances = [
        abs(pairs_of(resolve_pattern(AttentionConfig("streaming", window=n, **attention), 2), text) - wanted)
        for n in range(1, 129)
    ]
    assert abs(pairs_of(bare, text) - wanted) == min(distances) == distances[window - 1]


def test_ratio_of_unequal_counts() -> None:
    """Two samples with 1 and 3 counted tokens: mean over tokens, error by the formula worked out by hand."""
    values = torch.tensor([[4.0, 9.0, 9.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    mean, error = token_mean(values, mask)
    assert mean == 2.5
    # Residuals 4 - 2.5 and 6 - 7.5.
    assert error == pytest.approx(math.sqrt(2 / 1 * (1.5**2 + 1.5**2)) / 4)
    assert math.isnan(token_mean(values, torch.zeros(2, 3, dtype=torch.bool)).mean)
    assert math.isnan(token_mean(values[:1]).error)


def test_sources_take_turns() -> None:
    turns = TakingTurns([["a", "b", "c"], ["x", "y"]])
    assert [turns[number] for number in range(len(turns))] == ["a", "x", "b", "y"]


def test_base_of_a_dense_model_is_the_papers_pattern() -> None:
    dense = AttentionConfig("dense", sink="learned", separate_documents=True)
    base = base_attention(dense, [])
    assert base == AttentionConfig(sink="learned", separate_documents=True)
    assert base_attention(dense, ["pattern=sep", "attention.separators=[period]"]).separators == ["period"]

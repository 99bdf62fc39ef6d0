"""The ablate command: what patterns keep, what they lose, and which intervals and windows keep as much."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sep_attention import visible_mask

from data_prep.separators import class_numbers
from sepllm_train.analysis.ablation import SUBSETS, Ablation, AblationOptions, RandomTokens
from sepllm_train.analysis.match import kept_keys
from sepllm_train.base.statistics import token_mean
from sepllm_train.config.schema import AttentionConfig
from sepllm_train.model.pattern import resolve_pattern
from sepllm_train.runs.evaluate import evaluate, far_recall
from sepllm_train.runs.held_out import text_of
from sepllm_train.runs.open import TrainedRun
from tests.analysis.conftest import Trained, with_attention
from tests.analysis.test_cli import refused
from tests.support.command import command

main = command("analyze")

SAMPLES = 3


def rows_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["rows"]}


@pytest.fixture(scope="module")
def answers(run: TrainedRun) -> dict[str, Any]:
    """Of a run with windows 8 and 16, asked with n = 8 in both layers."""
    options = AblationOptions(window=8, subsets=["nine=paper", "four=comma,period,colon,newline", "period,newline"])
    return Ablation(run, options, SAMPLES).answer(lambda: None)


def test_rows_are_evaluations_of_their_patterns(answers: dict[str, Any], run: TrainedRun) -> None:
    own = evaluate(run.model, run.pattern, run.validation, SAMPLES)
    text = text_of(run.validation, SAMPLES)
    far = far_recall(text["tokens"], text["labels"], 8)
    rows = rows_of(answers)
    assert answers["far_recall_share"] == pytest.approx(float(far.double().mean()))
    assert rows["as trained"]["change"].mean == rows["as trained"]["change"].error == 0 != rows["dense"]["change"].mean
    for row in rows.values():
        if row["series"] == "random":
            continue
        attention = run.config.attention if row["name"] == "as trained" else AttentionConfig(**row["attention"])
        pattern = resolve_pattern(attention, 2)
        losses = evaluate(run.model, pattern, run.validation, SAMPLES)
        assert row["change"] == pytest.approx(token_mean(losses.nats - own.nats), rel=1e-9)
        assert row["far_recall_change"] == pytest.approx(token_mean(losses.nats - own.nats, far), rel=1e-9)
        plan = pattern.plan(text["separator_class"], text["document_start"])
        keys = [visible_mask(plan, layer.window, layer.horizons).sum(2).double() for layer in pattern.layers]
        share = torch.stack(keys).mean(0) / torch.arange(1, 129)
        assert row["kv_kept"] == pytest.approx(float(share[:, -1].mean()))
        assert row["kv_kept_mean"] == pytest.approx(float(share.mean()))
        assert row["attended_share"] == pytest.approx(losses.attended_share)


def test_subsets_are_nested_and_matched_by_the_nearest(answers: dict[str, Any], run: TrainedRun) -> None:
    text = text_of(run.validation, SAMPLES)
    rows = rows_of(answers)
    for key in ("kv_kept", "kv_kept_mean", "attended_share"):
        shares = [rows[name][key] for name in ("none, n = 8", "period,newline", "four", "nine", "dense")]
        # Two subsets keep the same keys of a text that has no separators of the larger one alone.
        assert shares == sorted(shares) and shares[0] < shares[1] < shares[-2] < shares[-1] == 1
    assert rows["nine"]["density"] == pytest.approx(
        float(((text["separator_class"] > 0) & (text["separator_class"] < 10)).double().mean())
    )
    assert [row["subset"] for row in answers["equal"]] == ["nine", "four", "period,newline"]
    for row in answers["equal"]:
        subset = rows[row["subset"]]
        assert row["kv_kept"] == subset["kv_kept"]
        for key, name in (("interval", f"every D-th, D = {row['interval']}"), ("window", f"none, n = {row['window']}")):
            other = rows[name]
            assert row["subset"] in other["matches"] and row[f"{key}_kv_kept"] == other["kv_kept"]
            every = [AttentionConfig(**other["attention"] | {key: value}) for value in range(1, 129)]
            kept = [kept_keys(resolve_pattern(attention, 2), text).last for attention in every]
            nearest = min(abs(share - subset["kv_kept"]) for share in kept)
            assert abs(other["kv_kept"] - subset["kv_kept"]) == pytest.approx(nearest, abs=1e-12)
            assert row[f"{key}_gain"].mean == pytest.approx(other["loss"].mean - subset["loss"].mean, abs=1e-6)
    nine = answers["equal"][0]
    random = rows["random, as many as nine"]
    assert nine["random_gain"].mean == pytest.approx(random["loss"].mean - rows["nine"]["loss"].mean, abs=1e-6)
    assert random["loss"] != rows["nine"]["loss"] and random["density"] == rows["nine"]["density"]


def test_dense_changes_nothing_in_a_dense_model(run: TrainedRun) -> None:
    dense = with_attention(run, replace(run.config.attention, pattern="dense"))
    ablation = Ablation(dense, AblationOptions(subsets=["all"]), 2)
    # Dense, none, all, and the two that keep as much; no other pattern of the model's own.
    assert len(ablation.jobs) == 5 and (ablation.base.window, ablation.base.initial_tokens) == (64, 3)
    result = ablation.answer(lambda: None)
    row = result["rows"][0]
    assert row["name"] == "dense" and row["kv_kept"] == row["attended_share"] == 1
    assert row["change"].mean == row["change"].error == 0
    assert row["loss"] == token_mean(evaluate(run.model, dense.pattern, run.validation, 2).nats)


def test_each_class_that_occurs_is_a_subset(run: TrainedRun) -> None:
    present = set(text_of(run.validation, 2)["separator_class"].unique().tolist()) - {0}
    ablation = Ablation(run, AblationOptions(), 2)
    assert [layer.window for layer in resolve_pattern(ablation.base, 2).layers] == [8, 16] and ablation.window == 16
    subsets = [row for row in ablation.rows.values() if row.series == "subset"]
    assert [row.name for row in subsets[:2]] == ["nine", "four"]
    tokens = [frozenset(class_numbers(row.attention.separators)) & present for row in subsets]
    # Each class that occurs stands alone, by its own name or as a named subset.
    assert {frozenset([number]) for number in present} <= set(tokens)
    named = sum(row.name in SUBSETS for row in subsets)
    assert not set(tokens[named:]) & set(tokens[:named])


def test_separators_are_where_the_text_has_them(run: TrainedRun) -> None:
    """The model's own pattern is that of a run with moved separators; subsets are of the text's own."""
    moved = with_attention(run, replace(run.config.attention, placement="shuffled"))
    ablation = Ablation(moved, AblationOptions(subsets=["period"]), 2)
    natural = text_of(run.validation, 2)["separator_class"]
    assert torch.equal(ablation.text["separator_class"], natural)
    assert not torch.equal(text_of(ablation.trained.dataset, 2)["separator_class"], natural)


def test_random_tokens_know_nothing_of_the_text() -> None:
    """Seed, number of the sample and position decide; nothing that is in a sample, nor its length."""

    def special(length: int, number: int, seed: int = 1) -> torch.Tensor:
        samples = [{"tokens": torch.arange(length), "separator_class": torch.full((length,), length % 9)}] * 2
        return RandomTokens(samples, 0.2, seed)[number]["separator_class"] > 0

    drawn = special(5000, 0)
    assert torch.equal(special(400, 0), drawn[:400])
    assert not torch.equal(special(5000, 1), drawn) and not torch.equal(special(5000, 0, seed=2), drawn)
    assert float(drawn.double().mean()) == pytest.approx(0.2, abs=0.02)


def test_ablate_command(trained: Trained, tmp_path: Path) -> None:
    output = tmp_path / "ablation"
    options = ["--samples", "2", "--subsets", "nine=paper", "period", "--initial", "1"]
    assert main(["ablate", str(trained.folder), *options, "--output", str(output)]) == 0
    result = json.loads((output / "ablation.json").read_text())
    assert result["checkpoint"]["step"] == 4 and result["initial_tokens"] == 1 and result["window"] == [8, 16]
    markdown = (output / "ablation.md").read_text()
    for row in result["rows"]:
        assert row["name"] in markdown and f"{row['change']['mean']:+.4f} ± {row['change']['error']:.4f}" in markdown
    files = {"ablation.json", "ablation.md", "ablation.svg", "ablation_far_recall.svg"}
    assert {path.name for path in output.iterdir()} == files


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", "0"], "--window 0: a window counts the token itself"),
        (["--initial", "-1"], "--initial -1 must be 0 or more"),
        (["--subsets", "period", "dot,comma"], "Unknown separator class 'dot'"),
        (["--subsets", "a=period", "a=comma"], "there are two subsets called a"),
        (["--subsets", "fullwidth_clause"], "--subsets fullwidth_clause: these samples have no such token"),
        (["--samples", "0"], "--samples 0 must be at least 1"),
    ],
)
def test_mistake(trained: Trained, options: list[str], words: str, tmp_path: Path, capsys: Any) -> None:
    refused(["ablate", str(trained.folder), *options, "--output", str(tmp_path / "out")], words, capsys)
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(trained: Trained, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    refused(
        ["ablate", str(trained.folder), "--output", str(tmp_path / "file")], "is a file: it must be a folder", capsys
    )


def test_a_run_with_drawn_windows(run: TrainedRun) -> None:
    """Its rows have one window, that of validation."""
    drawn = replace(run.config.attention, window=8, window_choices=[4, 8])
    asked = with_attention(run, drawn)
    rows = rows_of(Ablation(asked, AblationOptions(subsets=["period"]), 1).answer(lambda: None))
    assert rows["dense"]["attended_share"] == 1 and rows["period"]["attention"]["window"] == 8

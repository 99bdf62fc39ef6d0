"""The attention configuration becomes tiers, horizons and per-layer windows."""

from __future__ import annotations

import torch
from sep_attention import FOREVER

from data_prep.separators import CLASSES
from sepllm_train.config.schema import AttentionConfig
from sepllm_train.model.pattern import resolve_pattern

NUMBER = {entry.name: entry.number for entry in CLASSES}


def classes_of(*names: str) -> torch.Tensor:
    """u8 [1, S]: one token per name, '' for an ordinary one."""
    return torch.tensor([[NUMBER[name] if name else 0 for name in names]], dtype=torch.uint8)


def test_paper_counts_the_nine_only() -> None:
    pattern = resolve_pattern(AttentionConfig(initial_tokens=0), layers=2)
    plan = pattern.plan(classes_of("", "period", "sentence_merged", "newline", "comma"), torch.zeros(1, 5))
    assert plan.tier.tolist() == [[0, 1, 0, 1, 1]]
    assert [layer.window for layer in pattern.layers] == [64, 64]


def test_all_takes_every_class() -> None:
    pattern = resolve_pattern(AttentionConfig(separators="all", initial_tokens=0), layers=1)
    names = [entry.name for entry in CLASSES]
    assert pattern.plan(classes_of("", *names), torch.zeros(1, len(names) + 1)).tier.tolist() == [
        [0, *[1] * len(names)]
    ]


def test_full_layers() -> None:
    full = {
        "none": [False] * 3,
        "first": [True, False, False],
        "first_last": [True, False, True],
    }
    for setting, expected in full.items():
        pattern = resolve_pattern(AttentionConfig(full_layers=setting), layers=3)
        assert [layer.full for layer in pattern.layers] == expected
    listed = resolve_pattern(AttentionConfig(full_layers=[1], window=[4, 8, 16]), layers=3)
    assert [layer.window for layer in listed.layers] == [4, FOREVER, 16]


def test_tiers_fall_from_forever_and_a_class_in_two_keeps_the_larger() -> None:
    separators = [
        {"classes": ["comma", "period"], "horizon": 512},
        {"classes": ["period"], "horizon": 4096},
        {"classes": ["newline"], "horizon": "forever"},
    ]
    pattern = resolve_pattern(AttentionConfig(separators=separators, initial_tokens=1), layers=1)
    assert pattern.layers[0].horizons == (FOREVER, 4096, 512)
    plan = pattern.plan(classes_of("comma", "comma", "period", "newline", ""), torch.zeros(1, 5))
    assert plan.tier.tolist() == [[1, 3, 2, 1, 0]]


def test_streaming_has_initial_tokens_only() -> None:
    pattern = resolve_pattern(AttentionConfig(pattern="streaming", initial_tokens=2), layers=1)
    assert pattern.plan(classes_of("period", "", "period", "period"), torch.zeros(1, 4)).tier.tolist() == [[1, 1, 0, 0]]


def test_fixed_ignores_the_text() -> None:
    pattern = resolve_pattern(AttentionConfig(pattern="fixed", interval=3, initial_tokens=0), layers=1)
    plan = pattern.plan(classes_of("", "period", "period", "", "", "", ""), torch.zeros(1, 7))
    assert plan.tier.tolist() == [[1, 0, 0, 1, 0, 0, 1]]


def test_documents_restart_the_initial_tokens() -> None:
    starts = torch.tensor([[0, 0, 2, 2, 2]], dtype=torch.int32)
    attention = AttentionConfig(pattern="streaming", initial_tokens=1, separate_documents=True)
    plan = resolve_pattern(attention, layers=1).plan(classes_of("", "", "", "", ""), starts)
    assert plan.tier.tolist() == [[1, 0, 1, 0, 0]]
    packed = resolve_pattern(AttentionConfig(pattern="streaming", initial_tokens=1), layers=1)
    assert packed.plan(classes_of("", "", "", "", ""), starts).document_start is None


def test_dense_is_dense() -> None:
    assert resolve_pattern(AttentionConfig(pattern="dense"), layers=2).dense
    assert not resolve_pattern(AttentionConfig(pattern="dense", separate_documents=True), layers=2).dense
    assert not resolve_pattern(AttentionConfig(full_layers="first"), layers=2).dense

"""Context parallelism: exact attention and gradients, balanced ranks, little to send."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from sep_attention import FOREVER, AttentionPlan, build_plan, keys_per_query

from data_prep.sidecar import open_classes
from sepllm_train.config.schema import AttentionConfig
from sepllm_train.distributed.context import (
    keys_sent,
    mean_keys_sent,
    part_of,
    plan_exchange,
    ring_keys,
    visible_keys,
    zigzag,
)
from sepllm_train.model.pattern import LayerPattern, resolve_pattern
from tests.distributed.context_worker import CASES, compare_all
from tests.support.distributed_runner import run_ranks

LENGTH = 32768
WINDOW = 128


@pytest.fixture(scope="module", params=["Bernoulli", "text"])
def long_plan(request: pytest.FixtureRequest) -> AttentionPlan:
    """Two sequences of 32,768 tokens: separators drawn with a density of 12%, or those of the sample corpus."""
    if request.param == "Bernoulli":
        separators = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.12
        return build_plan(separators, initial_tokens=3)
    prefix: Path = request.getfixturevalue("sample_prefix")
    classes = torch.from_numpy(open_classes(str(prefix))[: 2 * LENGTH].copy()).view(2, LENGTH)
    plan = resolve_pattern(AttentionConfig(), 1).plan(classes, torch.zeros(2, LENGTH, dtype=torch.int32))
    assert 0.05 < (plan.tier == 1).float().mean() < 0.2
    return plan


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_zigzag_holds_every_position_once(size: int) -> None:
    positions = torch.arange(24).expand(2, 24)
    parts = [part_of(positions, rank, size) for rank in range(size)]
    assert all(part.shape == (2, 24 // size) for part in parts)
    assert torch.equal(torch.cat(parts, 1).sort().values, positions)
    chunks = [chunk for rank in range(size) for chunk in zigzag(24, rank, size)]
    assert all(len(chunk) == 24 // (2 * size) for chunk in chunks)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_attend_alike(long_plan: AttentionPlan, size: int) -> None:
    """Pairs differ by less than 10% between ranks."""
    for layer in (LayerPattern(WINDOW, (FOREVER,)), LayerPattern(FOREVER, (FOREVER,))):
        seen = keys_per_query(long_plan, layer.window, layer.horizons)
        pairs = [int(part_of(seen, rank, size).sum()) for rank in range(size)]
        assert max(pairs) < 1.1 * min(pairs), pairs


@pytest.mark.parametrize("size", [2, 4, 8])
def test_sends_a_fifth_of_ring_attention(long_plan: AttentionPlan, size: int) -> None:
    """Bar: 20% of the bytes, on average and on the rank that sends or receives the most."""
    sent = keys_sent(long_plan, WINDOW, size)
    ring = 2 * ring_keys(LENGTH, size)
    assert int(sent.sum(0).max()) < 0.2 * ring and int(sent.sum(1).max()) < 0.2 * ring
    assert mean_keys_sent([long_plan], WINDOW, size) == pytest.approx(float(sent.sum()) / size / 2)
    # Full layers gather every earlier key: no chunk needs later ones, so this too is less than ring attention's.
    everything = keys_sent(long_plan, LENGTH, size)
    assert 0.5 * ring < float(everything.float().sum(0).mean()) <= ring


def test_ranks_agree_on_what_is_sent(long_plan: AttentionPlan) -> None:
    exchanges = [plan_exchange(long_plan, WINDOW, rank, 4) for rank in range(4)]
    sent = torch.tensor([exchange.send_counts for exchange in exchanges])
    assert torch.equal(sent, keys_sent(long_plan, WINDOW, 4))
    assert torch.equal(sent.T, torch.tensor([exchange.receive_counts for exchange in exchanges]))


def test_virtual_sequence_is_short(long_plan: AttentionPlan) -> None:
    """The last chunk sees its own keys, its neighbours and the special keys before them."""
    first, second = plan_exchange(long_plan, WINDOW, 0, 2).chunks
    queries = zigzag(LENGTH, 0, 2)[1]
    assert first.plan.sequence_length == LENGTH // 4
    special = (long_plan.tier[:, : queries.start - WINDOW + 1] == 1).sum(1)
    expected = int(special.max()) + WINDOW - 1 + len(queries)
    assert expected <= second.plan.sequence_length < expected + 64
    assert torch.equal(visible_keys(long_plan, WINDOW, queries).sum(1), special + WINDOW - 1 + len(queries))


@pytest.mark.distributed
@pytest.mark.slow
def test_attention_equals_one_process() -> None:
    """Outputs and gradients of groups of 2 and of 4 ranks, and what they send, for every kind of pattern."""
    ranks = run_ranks(compare_all, 4)
    for size, name in product(("2", "4"), CASES):
        results = [rank[size][name] for rank in ranks]
        for result in results:
            assert result["output"] < 1e-12 and result["gradients"] < 1e-12, (name, result)
            # Rounding of bfloat16 inputs, weights and gradients, in sums of up to 96 terms.
            assert result["half"] < 1e-2, (name, result)
            assert result["sent_bytes"] == result["planned_bytes"], (name, result)
        assert sum(result["sent_bytes"] for result in results) > 0 or "documents of a token" in name

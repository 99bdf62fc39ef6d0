"""Far-recall tokens against the words of their definition."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sepllm_train.runs.evaluate import far_recall, recall_distance, stacked_reach


def by_definition(x: list[int], window: int) -> list[bool]:
    """For t = 1...S: (x[t-1], x[t]) occurred before, and its most recent occurrence is more than `window` back."""
    result = []
    for t in range(1, len(x)):
        earlier = [u for u in range(1, t) if (x[u - 1], x[u]) == (x[t - 1], x[t])]
        result.append(bool(earlier) and t - max(earlier) > window)
    return result


sequences = st.integers(2, 40).flatmap(
    lambda length: st.lists(st.lists(st.integers(0, 3), min_size=length, max_size=length), min_size=1, max_size=3)
)


@given(sequences, st.integers(1, 12))
def test_mask_is_the_definition(rows: list[list[int]], window: int) -> None:
    text = torch.tensor(rows)
    found = far_recall(text[:, :-1], text[:, 1:], window)
    assert found.tolist() == [by_definition(row, window) for row in rows]


def test_distance_of_a_first_bigram_is_none() -> None:
    x = torch.tensor([[7, 8, 7, 8, 9, 7, 8]])
    assert recall_distance(x[:, :-1], x[:, 1:]).tolist() == [[0, 0, 2, 0, 0, 3]]


def test_stacked_windows_carry_so_far_and_no_further() -> None:
    """Reach through layers of a mask, step by step, against the formula."""
    window, layers, length = 4, 3, 40
    query = length - 1
    reached = {query}
    for _ in range(layers):
        reached = {key for place in reached for key in range(place - window + 1, place + 1)}
    # The query predicts token query + 1.
    assert query + 1 - min(reached) == stacked_reach(window, layers)

"""Numbers as text, and lines that are folded."""

from __future__ import annotations

import pytest

from sepllm_train.base.console import flop_count, fold


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0 FLOP"), (140.0, "140 FLOP"), (1.4e8, "140 MFLOP"), (3.574e12, "3.57 TFLOP")]
)
def test_work_is_not_written_like_a_rate(value: float, text: str) -> None:
    assert flop_count(value) == text


def test_short_lines_stay() -> None:
    assert fold("data: a | b") == "data: a | b"


def test_lines_break_before_a_bar() -> None:
    assert fold("data: first | second | third", 20) == "data: first | second\n  | third"
    assert fold("data: first | second | third", 20).replace("\n  ", " ") == "data: first | second | third"


def test_a_part_breaks_between_words_and_a_path_not_at_all() -> None:
    text = "warning: some words that are too long | /a/path/that/is/longer/than/the/line | end"
    assert fold(text, 20).splitlines() == [
        "warning: some words",
        "  that are too long",
        "  | /a/path/that/is/longer/than/the/line",
        "  | end",
    ]

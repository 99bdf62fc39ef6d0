"""sepllm evaluate kv: the share of the paper's prompts, and mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sepllm_train.evaluation.kv_share import kept_share
from tests.evaluation.conftest import write_lines
from tests.support.command import program

main = program("evaluate kv")


def test_the_share_of_gsm8k_with_the_nine_separators(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of real prompts in the GPT-NeoX tokenizer: the reference is a count made apart from this code."""
    tokenizer = shared_data / "tokenizers/20B_tokenizer.json"
    main(["--data-dir", str(shared_data / "eval"), "--tokenizer", str(tokenizer), "--window", "256", "--initial", "3"])
    told = capsys.readouterr().out
    assert float(told.split()[0]) == pytest.approx(0.4995, abs=5e-4)
    assert "1,319 prompts" in told and "9 separator tokens" in told


@pytest.mark.parametrize("interval", [None, 3])
def test_kept_tokens_by_hand(interval: int | None) -> None:
    prompts = [[5, 1, 7, 1, 7, 7, 1, 7, 7, 7], [1, 7]]
    found = kept_share(prompts, [1], window=2, initial=1, interval=interval)
    # Positions 0, 8, 9 and those of the 1s (1, 3, 6), or 0, 3, 6, 9 of every third.
    kept = 6 if interval is None else 5
    assert found.share == pytest.approx((kept + 2) / 12)
    assert found.mean == pytest.approx(np.mean([kept / 10, 1])) and (found.prompts, found.tokens) == (2, 6)


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--window 0", "--window 0 must be at least 1"),
        ("--classes vowels", "Unknown separator class 'vowels'"),
        ("--tokenizer nothing.json", "nothing.json"),
        ("", "cot_8shot.jsonl, and it is not there"),
    ],
)
def test_mistakes(
    tmp_path: Path, models: dict[str, Path], words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "gsm8k/test.jsonl", [{"question": "a?", "answer": "b"}])
    if words:
        write_lines(tmp_path / "gsm8k/cot_8shot.jsonl", [{"question": "a?", "target": "b"}])
    given = ["--data-dir", str(tmp_path), "--tokenizer", str(models["sep"] / "tokenizer.json"), *words.split()]
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2 and sentence in capsys.readouterr().err

"""Console lines of a run: words, and no line over 120 characters."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import replace
from typing import Any

import pytest

from sepllm_train.base.console import WIDTH
from sepllm_train.training.console_lines import StepLine
from tests.support.small_run import train_here

LONG_RUN = StepLine(
    step=81510,
    steps=143000,
    sequence_length=None,
    loss=2.4895,
    grad_norm=0.764,
    learning_rate=1.77e-4,
    tokens_per_second=298_123.0,
    mfu=0.413,
    flops=3.65e18,
    attended_share=0.196,
    seconds_left=191_000.0,
)


@pytest.mark.parametrize(
    "overrides",
    [
        ("+experiment=demo_sep",),
        ("+experiment=demo_sep", "attention=tiers", "attention.window=[16,32,64,64]"),
        ("+experiment=demo_dense", "training.compile=true", "training.loss_chunk=1000", "training.steps=9000"),
        ("+experiment=pythia160m_sep_ht", "parallel.tensor=2"),
        ("+experiment=pythia160m_sep_curriculum", "attention.separators=auto"),
        ("+experiment=pythia160m_sep_batches", "parallel.tensor=2"),
        ("+experiment=pythia160m_sep_stochastic", "parallel.context=2", "parallel.pipeline=2"),
        ("+experiment=pythia1.4b_sep", "parallel.tensor=2", "parallel.sequence=true", "training.precision=bf16"),
    ],
    ids=["demo_sep", "tiers", "dense", "layers", "curriculum", "batches", "windows", "1.4b"],
)
def test_start_lines_fit_the_console(trainer: Any, overrides: tuple[str, ...]) -> None:
    folders = (f"run_root={trainer.root}", f"data.cache={trainer.cache}")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        train_here(*overrides, *folders, "dry_run=true", "name=wide")
    lines = output.getvalue().splitlines()
    wide = [line for line in lines if len(line) > WIDTH]
    # A path is not broken: it may be longer than a line.
    assert not [line for line in wide if len(line.split(" | ")) > 1 or "/" not in line], wide
    text = re.sub(r"\n +", " ", output.getvalue())
    assert re.search(r"\| whole run [\d.]+ [TPEZ]FLOP$", text, re.MULTILINE)
    sep = "demo_dense" not in overrides[0]
    assert bool(re.search(r"^data: .* \| separators in use \d+\.\d% of the tokens \| tokenizer ", text, re.M)) is sep
    # Large models do not fit this machine.
    passed = r"^dry run: the checks of a run on (1 process|\d processes) passed(, but [^;]*)?; nothing"
    assert re.search(passed, text, re.MULTILINE)


def test_the_step_line_of_a_long_run_fits_the_console() -> None:
    text = str(LONG_RUN)
    assert text == (
        "step 81510/143000 (57%)  loss 2.4895  grad 0.764  lr 1.8e-04  298k tok/s  MFU 41%  3.65 EFLOP  attended 19.6%"
        "  ETA 2d05h"
    )
    assert len(text) <= WIDTH
    more = str(replace(LONG_RUN, sequence_length=16384, batch=1024, skipped=2, bad=1))
    assert (
        "S 16384  batch 1024  loss" in more and "2 steps skipped (overflow)" in more and "1 bad steps skipped" in more
    )
    assert max(map(len, more.splitlines())) <= WIDTH

"""One object for a trained run: what it reads, when, and what it refuses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sepllm_train.base.errors import UserError
from sepllm_train.runs import TrainedRun, open_run
from tests.analysis.conftest import Trained
from tests.support.waiting import HANG_SECONDS


def test_a_run_has_its_patterns_and_reads_them_once(trained: Trained) -> None:
    run = open_run(trained.folder)
    assert (run.checkpoint.step, run.checkpoint.tokens) == (4, 4 * 4 * 128)
    assert run.vocabulary == len(run.classes) == len(run.token_pattern.tier_of_token) == 4096
    assert [layer.window for layer in run.pattern.layers] == [8, 16] == list(run.token_pattern.windows)
    assert run.token_pattern.separators == sorted(
        index for index, number in enumerate(run.classes) if run.pattern.tier_of_class[number]
    )
    assert run.token_pattern is run.token_pattern and run.tokenizer is run.tokenizer
    assert run.checkpoint.attention.separators == run.config.attention.separators


def test_what_is_asked_for_takes_the_place_of_the_runs_own(trained: Trained) -> None:
    run = open_run(trained.folder, 2, held_out=0.25)
    assert run.checkpoint.step == 2 and run.own_data and run.config.data.validation_fraction == 0.25
    other = open_run(trained.folder, data="data/other")
    assert not other.own_data and other.config.data.prefixes == ["data/other"]


def test_damaged_checkpoints_are_skipped_and_named(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.folder, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_00000004"
    (newest / "state.json").unlink()
    run = open_run(tmp_path / "run")
    assert run.checkpoint.step == 2 and list(run.skipped) == [newest]
    with pytest.raises(UserError, match="step_00000004 is damaged"):
        open_run(tmp_path / "run", 4)


def test_the_model_is_loaded_once_and_anew_when_asked(run: TrainedRun) -> None:
    assert run.model is run.model is not run.load_model()
    assert run.sample_count(None) == 5 and run.sample_count(10**9) == len(run.validation)
    with pytest.raises(UserError, match="--samples 0 must be at least 1"):
        run.sample_count(0)


def test_a_missing_run_is_refused_without_torch(tmp_path: Path) -> None:
    program = f"""
import sys
from sepllm_train.base.errors import UserError
from sepllm_train.runs import open_run
try:
    open_run({str(tmp_path)!r})
except UserError as error:
    print(error, sorted({{"torch", "megatron", "transformers"}} & set(sys.modules)))
"""
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANG_SECONDS).stdout
    assert printed == f"{tmp_path / 'config.yaml'} does not exist: give the folder of a run, such as runs/NAME. []\n"

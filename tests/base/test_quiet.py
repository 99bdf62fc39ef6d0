"""Libraries print nothing in a run but what is listed in sepllm_train/base/quiet.py: warnings are errors here."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from sepllm_train.base.quiet import mute, quiet
from tests.support.small_run import SMALL_RUN

STEPS = ("training.steps=3", "training.checkpoint_interval=2", "training.validation_interval=2")


def run_strictly(*command: str, sample_cache: Path) -> None:
    """Run a program whose warnings are errors, its children's too, and check that it prints nothing on stderr."""
    environment = os.environ | {"PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1", "SEPLLM_CACHE": str(sample_cache)}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_a_step_a_save_a_resume_and_an_export(repository: Path, sample_cache: Path, tmp_path: Path) -> None:
    program = str(repository / "scripts" / "pretrain.py")
    common = (*SMALL_RUN, *STEPS, f"data.cache={sample_cache}", f"run_root={tmp_path}")
    run_strictly(program, *common, "name=first", sample_cache=sample_cache)
    first = tmp_path / "first" / "checkpoints" / "step_00000002"
    run_strictly(program, *common, "name=second", f"resume={first}", "training.steps=4", sample_cache=sample_cache)
    run_strictly(
        "-m", "sepllm_train", "export", str(tmp_path / "second"), str(tmp_path / "model"), sample_cache=sample_cache
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_a_step_with_tensor_and_sequence_parallelism(repository: Path, sample_cache: Path, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    layout = ("parallel.tensor=2", "parallel.sequence=true", "name=split")
    common = (*SMALL_RUN, *STEPS, f"data.cache={sample_cache}", f"run_root={tmp_path}")
    program = str(repository / "scripts" / "pretrain.py")
    run_strictly(*launcher, program, *common, *layout, sample_cache=sample_cache)


def test_a_toolkit_without_a_gpu_is_no_message(tmp_path: Path) -> None:
    """torch reports it where megatron-core imports its builder of extensions."""
    environment = os.environ | {"CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    muted = "from sepllm_train.base.quiet import mute; mute()"
    look = "from torch.utils import cpp_extension; cpp_extension._find_cuda_home()"
    plain, ours = (
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
        for code in (look, f"{muted}; {look}")
    )
    assert b"No CUDA runtime is found" in plain.stderr and ours.stderr == b""


def test_messages_are_muted_by_their_text() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("Apex is not installed. Falling back to Torch Norm", UserWarning, stacklevel=1)
            warnings.warn("another message", UserWarning, stacklevel=1)
        warnings.warn("Apex is not installed", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["another message", "Apex is not installed"]


def test_loggers_keep_their_other_messages(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        mute()
        mute()
    logger = logging.getLogger("torch.utils.cpp_extension")
    with caplog.at_level(logging.WARNING, logger=logger.name):
        logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/cuda")
        logger.warning("another message")
    assert [record.getMessage() for record in caplog.records] == ["another message"]
    assert len(logger.filters) == 1

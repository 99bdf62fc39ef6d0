"""The process grid of one process: set up, taken down, used again."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from sepllm_train.config.schema import Config, ParallelConfig
from sepllm_train.distributed.launch import ALONE, process_grid


def test_a_failed_block_leaves_no_grid_to_the_next() -> None:
    with pytest.raises(ZeroDivisionError), process_grid(Config(), ALONE):
        raise ZeroDivisionError
    assert not parallel_state.model_parallel_is_initialized() and not dist.is_initialized()
    with process_grid(Config(parallel=ParallelConfig(timeout_seconds=90.0)), ALONE):
        assert parallel_state.model_parallel_is_initialized()


def test_a_failure_during_the_set_up_leaves_no_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seed: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tensor_parallel, "model_parallel_cuda_manual_seed", fail)
        with process_grid(Config(), ALONE):
            pass
    assert not parallel_state.model_parallel_is_initialized() and not dist.is_initialized()
    with process_grid(Config(), ALONE):
        assert parallel_state.model_parallel_is_initialized()

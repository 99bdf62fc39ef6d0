"""One process as megatron-core's whole grid."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sepllm_train.config.schema import Config
from sepllm_train.distributed.launch import Launch, process_grid


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """The device of a single-process grid, which lives as long as the test module."""
    from megatron.core import parallel_state

    with process_grid(Config(), Launch(rank=0, world_size=1, local_rank=0, by_torchrun=False)) as device:
        yield device
        parallel_state.destroy_model_parallel()

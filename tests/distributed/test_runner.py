"""The helper that runs functions in several processes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.support.distributed_runner import run_ranks
from tests.support.waiting import HANG_SECONDS

pytestmark = pytest.mark.distributed


def total(offset: int) -> dict[str, object]:
    """Sum of the ranks, each plus `offset`, over gloo."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(value)
    dist.destroy_process_group()
    return {"rank": int(os.environ["RANK"]), "total": int(value)}


def fail_on_rank_1(ended: str) -> None:
    """Rank 1 fails while rank 0 would wait for it and then write the file `ended`."""
    if os.environ["RANK"] == "1":
        raise RuntimeError("rank 1 has had enough")
    time.sleep(HANG_SECONDS)
    Path(ended).touch()


def sleep() -> None:
    """Never ends."""
    time.sleep(HANG_SECONDS)


def test_every_rank_returns_its_result() -> None:
    assert run_ranks(total, 2, offset=10) == [{"rank": 0, "total": 21}, {"rank": 1, "total": 21}]


def test_failure_of_one_rank_ends_all_and_shows_its_output(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 1 ended with code 1[\s\S]*rank 1 has had enough"):
        run_ranks(fail_on_rank_1, 2, time_limit=2 * HANG_SECONDS, ended=str(tmp_path / "ended"))
    assert not (tmp_path / "ended").exists()


def test_time_limit() -> None:
    with pytest.raises(AssertionError, match="rank 0 was still running after 2 seconds"):
        run_ranks(sleep, 1, time_limit=2)

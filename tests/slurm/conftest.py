"""The cluster of the session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster(repository: Path) -> Iterator[Cluster]:
    """A Slurm of two nodes. Its folder is not pytest's: munged wants one that everybody may pass through."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with TemporaryDirectory(prefix="slurm-") as folder:
        Path(folder).chmod(0o755)
        cluster = Cluster(Path(folder), repository)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()

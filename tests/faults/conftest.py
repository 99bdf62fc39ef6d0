"""Fixtures of the fault tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.processes import Launcher


@pytest.fixture(scope="session")
def launcher(sample_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """Starts runs that a test disturbs."""
    return Launcher(tmp_path_factory.mktemp("disturbed"), sample_cache)

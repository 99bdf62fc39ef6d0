"""The small trained run of the tests of the analysis."""

from tests.analysis.conftest import grid, run, trained  # noqa: F401

"""The A/B of the kernels as far as it needs no GPU: the variants that it measures."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.benchmarks.conftest import Program

BASE = "b31b21f"


def test_variants_and_the_working_tree(program: Program, repository: Path, tmp_path: Path) -> None:
    known = subprocess.run(["git", "-C", str(repository), "cat-file", "-e", f"{BASE}^{{commit}}"], capture_output=True)
    if known.returncode:
        pytest.skip(f"the clone has no commit {BASE}")
    result = program("benchmarks/attention/ab/kernels_ab.py", "prepare", "--output", tmp_path / "ab")
    assert result.returncode == 0, result.stderr
    variants = {path.name: path for path in (tmp_path / "ab" / "variants").iterdir()}
    assert {"sep_shipped", "sep_p123", "sep_p1234", "sep_head"} <= set(variants)
    sources = repository / "kernels" / "sep_attention"
    copied = {path.relative_to(variants["sep_head"]) for path in variants["sep_head"].rglob("*.py")}
    assert copied == {path.relative_to(sources) for path in sources.rglob("*.py")}
    assert "from sep_head." in (variants["sep_head"] / "op.py").read_text(encoding="utf8")
    switches = (variants["sep_p1234"] / "triton_tiles.py").read_text(encoding="utf8")
    assert "CARRIED = tl.constexpr(True)" in switches and "TOGETHER = tl.constexpr(8)" in switches

"""The compile gate: the fast path passes, and what breaks a budget is said."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.benchmarks.conftest import Program
from tests.support.triton_support import NO_TRITON
from tests.support.waiting import HANG_SECONDS

pytest.importorskip("triton", reason=NO_TRITON)

GATE = "benchmarks.attention.compile_gate"


def test_fast_path_of_both_head_sizes(program: Program, tmp_path: Path) -> None:
    budget = tmp_path / "budget.json"
    budget.write_text('{"2.0": {}}', encoding="utf8")
    arguments = (
        "--head-sizes",
        64,
        128,
        "--dtypes",
        "bf16",
        "--architectures",
        90,
        "--variants",
        "paper",
        "--no-pairs",
        "--budget",
        budget,
    )
    result = program(GATE, *arguments)
    assert result.returncode == 0, result.stderr + result.stdout
    lines = [line for line in result.stdout.splitlines() if " sm_90 paper " in line]
    assert len(lines) == 6 and all(line.endswith(" ok") for line in lines)
    assert f"note: no budgets are recorded for Triton {version('triton')}, those of 2.0 are used\n" in result.stdout


CHANGES: list[tuple[dict[str, int], str | None]] = [
    ({}, None),
    ({"wgmma": 0}, "uses no wgmma"),
    ({"mma": 3}, "uses 3 of the slower mma instructions"),
    ({"spills": 65}, "spills 65 bytes of registers, its budget is 64"),
    ({"spills": 64}, None),
    ({"shared": 232449}, "takes 232449 bytes of shared memory, the limit is 232448"),
    ({"serialized": 1}, "has its wgmma serialised by ptxas"),
]


def test_violations() -> None:
    """In a process of its own, which defines the kernels without the interpreter that other tests may have on."""
    code = f"""
import json, sys
sys.path[:0] = {sys.path!r}
from benchmarks.attention.compile_gate import UserError, main, spill_budget, violations
from benchmarks.attention.compiled import Resources, Target
from sep_attention.triton.tuning import ShippedTile, Tile
target = Target(ShippedTile("forward", 128, "bf16", "half", 90, Tile(128, 64, 8, 3)))
values = dict(registers=200, spills=0, shared=1000, wgmma=8, mma=0, async_copies=4, serialized=False)
found = [violations(target, Resources(**(values | change)), {{}}) for change in {[change for change, _ in CHANGES]!r}]
general = Target(target.shipped._replace(head_size=96), "general")
budgets = [spill_budget(general, {{}}), spill_budget(general, {{general.name: 24}})]
sys.argv = ["compile_gate.py", "--head-sizes", "65"]
try:
    main()
except UserError as error:
    refused = str(error)
print(json.dumps([found, violations(target, "no such thing", {{}}), budgets, refused]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG_SECONDS
    )
    found, broken, budgets, refused = json.loads(result.stdout)
    for (_, sentence), problems in zip(CHANGES, found, strict=True):
        assert problems == [] if sentence is None else len(problems) == 1 and sentence in problems[0]
    assert broken == ["forward D128 bf16 sm_90 paper does not compile: no such thing"]
    assert budgets == [0, 24]
    assert refused.startswith("No shipped kernel is of that head size")

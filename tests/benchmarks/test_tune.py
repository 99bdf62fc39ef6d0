"""Tuning without a GPU: candidates, scores and the rewriting of the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.triton_support import NO_TRITON
from tests.support.waiting import HANG_SECONDS

pytest.importorskip("triton", reason=NO_TRITON)

CODE = """
import json, sys
sys.path[:0] = {paths!r}
from benchmarks.attention import tune
from sep_attention.triton.tuning import Tile, ShippedTile
source = open({table!r}, encoding="utf8").read()
chosen = {{"forward": Tile(64, 32, 4, 3, 128), "backward_kv": Tile(64, 64, 4, 2, None, True)}}
new = tune.rewritten(source, {{(90, "half", 128): chosen}})
before, after = source.splitlines(), new.splitlines()
changed = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
scope = {{"__name__": "tuned", "__file__": tune.__file__}}
exec(compile(new, "tuning.py", "exec"), scope)
tiles = {{line.kernel: list(line.tile) for line in scope["shipped_configurations"]()
    if (line.head_size, line.dtype, line.architecture) == (128, "bf16", 90)}}
try:
    tune.rewritten(source, {{(70, "half", 128): {{}}}})
    refused = ""
except tune.UserError as error:
    refused = str(error)
sys.argv, lacking = ["tune.py"], ""
if not tune.torch.cuda.is_available():
    try:
        tune.main()
    except tune.UserError as error:
        lacking = str(error)
else:
    lacking = "There is no CUDA device here"
candidates = [[list(tile) for tile in tune.candidates(kernel, 90)] for kernel in tune.KERNELS]
scores = tune.score([2.0, 8.0], [4.0, 4.0]), tune.score([2.0], [4.0])
print(json.dumps([changed, tiles, refused, scores, candidates, lacking]))
"""


def test_candidates_scores_and_table(repository: Path) -> None:
    """In a process of its own: the module takes Triton's interpreter, which other tests may have on, out."""
    table = repository / "kernels" / "sep_attention" / "triton" / "tuning.py"
    code = CODE.format(paths=sys.path, table=str(table))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert result.returncode == 0, result.stderr
    changed, tiles, refused, scores, candidates, lacking = json.loads(result.stdout)
    ((before, after),) = changed
    assert before.startswith('    (90, "half", 128): (Tile(')
    assert "Tile(64, 32, 4, 3, 128)" in after and "Tile(64, 64, 4, 2, split=True)" in after and len(after) <= 120
    assert tiles["forward"] == [64, 32, 4, 3, 128, False]
    assert tiles["backward_kv"] == [64, 64, 4, 2, None, True]
    assert "has no line for (70, 'half', 128)" in refused
    assert lacking.startswith("There is no CUDA device here")
    assert scores == [1.0, 0.5]
    for kind in candidates:
        assert len(kind) == len(set(map(tuple, kind))) and all(tile[4] is None or tile[2] == 8 for tile in kind)

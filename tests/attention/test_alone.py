"""The package where torch and what torch requires are all that can be imported."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

from tests.support.waiting import HANG_SECONDS

CODE = """
import json
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

path, allowed = sys.argv[1], set(json.loads(sys.argv[2])) | sys.stdlib_module_names


class Only:
    @staticmethod
    def find_spec(name, path=None, target=None):
        known = name.partition(".")[0] in allowed or name.startswith("_sysconfigdata")
        return PathFinder.find_spec(name, path, target) if known else None


# In the place of all others, among them those of editable installations.
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Only]
sys.path.insert(0, path)
import torch
from sep_attention import attended_pairs, build_plan, reference_attention, sep_attention

for name in ("numpy", "triton", "sepllm_train", "data_prep", "transformers"):
    assert name not in sys.modules, name
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(name + " can be imported: nothing is shown")

torch.manual_seed(0)
q, k, v = (torch.randn(2, heads, 300, 16, requires_grad=True) for heads in (4, 2, 2))
plan = build_plan(torch.rand(2, 300) < 0.1, initial_tokens=3)
expected = reference_attention(q, k, v, plan, window=16)
gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
attention = torch.compile(sep_attention, backend="aot_eager", fullgraph=True)
for call in (sep_attention, attention):
    out = call(q, k, v, plan, window=16)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    torch.testing.assert_close(found, gradients, atol=1e-4, rtol=1e-4)
assert 0 < int(attended_pairs(plan, 16).sum()) < 2 * 300 * 301 // 2
"""


def required_by(package: str) -> set[str]:
    """Top-level names of what a package requires, and what that does, without extras."""
    seen, waiting = set(), [package]
    while waiting:
        try:
            distribution = importlib.metadata.distribution(waiting.pop())
        except importlib.metadata.PackageNotFoundError:
            continue
        if distribution.name not in seen:
            seen.add(distribution.name)
            wanted = [line for line in distribution.requires or () if "extra ==" not in line]
            waiting += [re.match(r"[\w.-]+", line)[0] for line in wanted]
    tops = importlib.metadata.packages_distributions()
    return {top for top, distributions in tops.items() if seen & set(distributions)}


def test_forward_and_backward_with_torch_alone(repository: Path, tmp_path: Path) -> None:
    allowed = (required_by("torch") | {"sep_attention"}) - {"triton", "numpy"}
    command = [sys.executable, "-c", CODE, str(repository / "kernels"), json.dumps(sorted(allowed))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

"""The package and attention on the CPU in a process that cannot import Triton."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.waiting import HANG_SECONDS

CODE = """
import sys

sys.modules["triton"] = None  # as where it is not installed: its import raises ModuleNotFoundError
import torch
import sep_attention
from importlib.metadata import version

# From 0.18 on megatron-core imports Triton itself.
if tuple(map(int, version("megatron-core").split(".")[:2])) < (0, 18):
    import sepllm_train.model

assert "triton" not in sep_attention.available_backends("cpu") + sep_attention.available_backends("cuda")
assert sep_attention.select_backend("auto", sequence_length=4096, window=64, device="cuda").name == "flex"
try:
    sep_attention.select_backend("triton", sequence_length=4096, window=64, device="cuda")
except ValueError as error:
    assert "needs Triton" in str(error), error
else:
    raise AssertionError("the backend triton was chosen")

torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 40, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
plan = sep_attention.build_plan((torch.arange(40) % 5 == 4).byte()[None], initial_tokens=2)
expected = sep_attention.reference_attention(q, k, v, plan, window=4)
gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
for backend in ("blocked", "masked", "auto"):
    out = sep_attention.sep_attention(q, k, v, plan, window=4, backend=backend)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), (q, k, v)), gradients)

cache = sep_attention.DecodeCache.allocate(1, 1, 2, 2, 9, 8, initial=2, separators=3, window=3, dtype=torch.float32)
sep_attention.advance(cache, torch.tensor([1]), torch.tensor([0, 5], dtype=torch.int32))
sep_attention.write(cache, 0, torch.ones(1, 2, 8), torch.ones(1, 2, 8))
torch.testing.assert_close(sep_attention.attend(cache, 0, torch.ones(1, 2, 8), 1.0), torch.ones(1, 2, 8))
assert not [name for name in sys.modules if name.startswith("sep_attention.triton_")]
"""


def test_the_package_the_model_and_the_cpu_backends(repository: Path) -> None:
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 0, done.stderr

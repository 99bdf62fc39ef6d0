"""megatron-core's CUDA calls on a machine without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sepllm_train.base.quiet import quiet
from sepllm_train.distributed import cpu
from sepllm_train.distributed.optional import OPTIONAL, optional_packages
from tests.support.waiting import HANG_SECONDS

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available: nothing is redirected there")


def run_python(code: str) -> str:
    """Standard output and error of `code` in a fresh interpreter that shows every warning."""
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_never_installed_where_a_gpu_is_available() -> None:
    code = """
import torch
torch.cuda.is_available = lambda: True
names = ("current_device", "synchronize", "get_rng_state", "manual_seed")
before = [getattr(torch.cuda, name) for name in names]
from sepllm_train.distributed import cpu
try:
    cpu.install()
except RuntimeError as error:
    print(error)
print(cpu.installed(), before == [getattr(torch.cuda, name) for name in names])
"""
    assert run_python(code).splitlines() == [
        "a GPU is available: megatron-core must not be redirected to the CPU",
        "False True",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_grid_with_a_gpu_is_not_redirected() -> None:
    from sepllm_train.config.schema import Config
    from sepllm_train.distributed.launch import Launch, process_grid

    with process_grid(Config(), Launch(rank=0, world_size=1, local_rank=0, by_torchrun=False)) as device:
        assert device.type == "cuda"
        assert not cpu.installed()
        assert torch.zeros(1, device="cuda").device.type == "cuda"


@without_gpu
def test_second_install_changes_nothing() -> None:
    cpu.install()
    before = torch.cuda.current_device
    depth = torch._C._len_torch_function_stack()
    cpu.install()
    assert cpu.installed()
    assert torch.cuda.current_device is before
    assert torch._C._len_torch_function_stack() == depth


@without_gpu
def test_cuda_tensors_are_cpu_tensors() -> None:
    cpu.install()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.empty_like(torch.zeros(2), device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.tensor([1.0], device=torch.cuda.current_device()).device.type == "cpu"
    tensor = torch.ones(3)
    assert tensor.cuda() is tensor
    assert torch.zeros(2, device="meta").device.type == "meta"
    torch.cuda.synchronize()


@without_gpu
def test_only_the_optimizer_is_told_a_cuda_type() -> None:
    cpu.install()
    tensor = torch.ones(1)
    assert tensor.type() == "torch.FloatTensor"
    assert (
        eval("tensor.type()", {"__name__": "megatron.core.optimizer.x", "tensor": tensor}) == "torch.cuda.FloatTensor"
    )
    assert tensor.type(torch.float64).dtype == torch.float64


@without_gpu
def test_forked_random_state_comes_back() -> None:
    cpu.install()
    with quiet():
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    tracker = CudaRNGStatesTracker()
    torch.manual_seed(5)
    tracker.add("branch", 7)
    with tracker.fork("branch"):
        inside = torch.rand(3)
    outside = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(outside, torch.rand(3))
    torch.manual_seed(7)
    assert torch.equal(inside, torch.rand(3))


def test_importing_the_model_prints_no_warning_about_optional_packages() -> None:
    assert run_python("import sepllm_train.model.build") == ""


def test_optional_packages_are_named_in_one_line() -> None:
    line = optional_packages()
    assert "\n" not in line
    for name, _, use, instead in OPTIONAL:
        assert f"{name} found: {use}" in line or f"{name} not found: {instead} instead" in line

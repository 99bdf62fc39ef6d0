"""Runs megatron-core without a GPU: what it hard-codes to CUDA, met in one place.

Patched by `install`, with the call sites in megatron-core 0.16.1 to 0.19.2 that need it:

- `device="cuda"` literals become "cpu": the overflow buffers and norms of `optimizer/clip_grads.py`, `found_inf` of
  `optimizer/optimizer.py`, the result checks of `dist_checkpointing/strategies/state_dict_saver.py`.
- `Tensor.cuda()` returns the tensor: `pipeline_parallel/schedules.py` (token counts), tied embeddings in
  `models/common/language_module/language_module.py`, `dist_checkpointing/exchange_utils.py`.
- `Tensor.type()` names a CUDA type, for `optimizer/` only: `clip_grads.py` and `optimizer.py` compare it with strings.
- `torch.cuda.current_device` is the CPU: buffers of `tensor_parallel/{layers,mappings,utils}.py`,
  `pipeline_parallel/p2p_communication.py`, `distributed/param_and_grad_buffer.py`,
  `models/common/embeddings/rotary_pos_embedding.py`, `utils.py`.
- `torch.cuda.synchronize` does nothing: `p2p_communication.py`, `dist_checkpointing/strategies/filesystem_async.py`.
- `torch.cuda.current_stream` is a stream without work: `distributed/param_and_grad_buffer.py` from 0.19 on.
- `torch.cuda.get_rng_state`, `torch.cuda.manual_seed` and `tensor_parallel.random._get/_set_cuda_rng_state` act on the
  CPU's generator: activation recompute and sequence parallelism fork it (`tensor_parallel/random.py`).

The last two are the only private names of megatron-core that this package uses: it has no public way to replace them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sepllm_train.base.quiet import quiet

_active: CudaOnCpu | None = None


class CudaOnCpu(TorchFunctionMode):
    """Answers requests for CUDA tensors with CPU tensors."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call `func`, its CUDA device replaced by the CPU."""
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs and _called_by_optimizer():
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def installed() -> bool:
    """True once `install` has been called in this process."""
    return _active is not None


def install() -> None:
    """Let megatron-core run on the CPU for the rest of this thread's life; a second call does nothing.

    Raises RuntimeError where a GPU is available: there nothing may be redirected.
    """
    global _active
    if torch.cuda.is_available():
        raise RuntimeError("a GPU is available: megatron-core must not be redirected to the CPU")
    if _active is not None:
        return
    with quiet():
        from megatron.core.tensor_parallel import random

    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]
    torch.cuda.synchronize = _do_nothing
    torch.cuda.current_stream = _no_stream
    torch.cuda.get_rng_state = random._get_cuda_rng_state = _get_rng_state
    random._set_cuda_rng_state = _set_rng_state
    torch.cuda.manual_seed = _manual_seed
    _active = CudaOnCpu()
    _active.__enter__()


def undisturbed() -> Any:
    """Context for code that asks for no CUDA tensor: each operation is called directly, without a look at it first."""
    return torch._C.DisableTorchFunction()


def _is_cuda(device: Any) -> bool:
    """True when `device` (name, torch.device or None) is a GPU."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _called_by_optimizer() -> bool:
    """True when the code two frames up belongs to megatron-core's optimizer."""
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core.optimizer")


def _cpu_device() -> torch.device:
    return torch.device("cpu")


class _NoStream:
    """A stream of a device that has none: nothing ever runs on it, so that nothing has to be waited for."""

    def wait_event(self, event: Any) -> None:
        """Return at once."""

    wait_stream = wait_event


def _no_stream(device: Any = None) -> Any:
    return _NoStream()


def _do_nothing(device: Any = None) -> None:
    return None


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _manual_seed(seed: int) -> None:
    torch.manual_seed(seed)

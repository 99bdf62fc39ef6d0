"""Muon for the matrices of the layers, beside Adam for all other parameters, under tensor parallelism.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks": the momentum of a matrix is replaced by
the nearest semi-orthogonal one. torch.optim.Muon has its settings; what it cannot do is here: matrices of which each
tensor-parallel rank holds a part, matrices that are several in one, and single precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

# Key of Muon's parameter groups: rows of the matrices that a block of a fused one consists of, () for a plain one.
FUSED_ROWS = "muon_rows"
_EPSILON = 1e-7


class Muon(torch.optim.Muon):
    """torch.optim.Muon over this tensor-parallel rank's parts of matrices.

    The whole matrix is orthogonalised, so all layouts take the same step. Queries, keys and values of a fused
    projection, and the two halves of a gated one, are orthogonalised each on its own (Jordan et al.). `dtype`: of the
    Newton-Schulz iteration, bf16 in torch. The update is scaled by 0.2 sqrt(max(rows, columns)), with which it is as
    large as Adam's (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2).
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype) -> None:
        super().__init__(groups, adjust_lr_fn="match_rms_adamw")
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient. Every tensor-parallel rank calls it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def complete_state(self) -> None:
        """Give parameters that were never updated the state of step 0."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        lr, momentum, rows = group["lr"], group["momentum"], group[FUSED_ROWS]
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        direction = grad.lerp(mean, momentum)
        parameter.mul_(1 - lr * group["weight_decay"])
        dim = getattr(parameter, "partition_dim", 0)
        for weight, own in zip(matrices(parameter, rows), matrices(direction, rows), strict=True):
            whole = _gather(own.reshape(-1, own.shape[-1]).to(self.dtype), dim)
            orthogonal = orthogonalize(whole, group["ns_coefficients"], group["ns_steps"])
            part = orthogonal.chunk(parallel_state.get_tensor_model_parallel_world_size(), dim)[
                parallel_state.get_tensor_model_parallel_rank()
            ]
            weight.add_(part.reshape(weight.shape), alpha=-lr * (0.2 * math.sqrt(max(whole.shape))))


def matrices(fused: Tensor, rows: Sequence[int]) -> Iterator[Tensor]:
    """Views of the matrices in `fused` [R, C], whose blocks of sum(rows) rows have rows[i] of matrix i: [R / sum(rows),
    rows[i], C] each. Without rows `fused` itself."""
    if not rows:
        return iter((fused,))
    return iter(fused.view(-1, sum(rows), fused.shape[-1]).split(list(rows), dim=1))


def orthogonalize(matrix: Tensor, coefficients: Sequence[float], steps: int) -> Tensor:
    """About the semi-orthogonal matrix nearest to `matrix` [R, C], in its dtype, by Newton-Schulz iterations of degree
    five (Jordan et al.): singular values come to lie between 0.7 and 1.2."""
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=_EPSILON)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def _gather(part: Tensor, dim: int) -> Tensor:
    """The whole matrix of which each tensor-parallel rank has a part along `dim`."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(size)]
    dist.all_gather(parts, part.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim)


class MuonAndAdam:
    """Muon and Adam as the one optimizer inside of megatron-core's, with one loss scale of fp16 and one clipping.

    Takes the place of `adam`, whose groups with FUSED_ROWS become Muon's; groups and state are shared.
    """

    def __init__(self, adam: torch.optim.Optimizer, dtype: torch.dtype) -> None:
        self.param_groups = adam.param_groups
        self.state = adam.state
        self.adam = adam
        self.muon = Muon([group for group in self.param_groups if FUSED_ROWS in group], dtype)
        self.muon.state = adam.state
        adam.param_groups = [group for group in self.param_groups if FUSED_ROWS not in group]

    def step(self) -> None:
        """Update all parameters."""
        self.adam.step()
        self.muon.step()


def add_muon(optimizer: MegatronOptimizer, dtype: torch.dtype) -> None:
    """Let Muon update the groups with FUSED_ROWS of an optimizer that megatron-core made for Adam."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if any(FUSED_ROWS in group for group in part.optimizer.param_groups):
            part.optimizer = MuonAndAdam(part.optimizer, dtype)

"""Operations of a layer and the loss between matrix products: as they are written, or compiled by torch.compile.

These functions are the unit of compilation, not whole layers. They hold all that a compiler can fuse; what lies between
them is left to the libraries that do it best: matrix products, collectives of tensor and sequence parallelism (which
megatron-core overlaps with the backward pass), attention with its own kernels, recomputation. A layer compiled whole
would be cut at each of those and be guarded by its number, its window and the attention plan. A function of tensors
has no state, so one compilation serves every layer and micro-batch, names of weights stay as they are, and any layout
or recomputation works as without. It sees tokens [T, ...] and not sequences [S, B, ...]: micro-batches of as many
tokens share it whatever their length. megatron-core's fused GELU is the tanh approximation alone; here are both forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sepllm_train.config.schema import ModelConfig, TrainingConfig

# Compilations of one function that may be kept: with and without gradients for each shape that a process trains with.
COMPILATIONS = 128
# p(t) of `_HalfGelu`, from the linear term on.
TAIL = (0.319381530, -0.356563782, 1.781477937, -1.821255978, 1.330274429)


class Pointwise:
    """The functions of one model. `compiled`: whether torch.compile has them.

    activation(x, bias): MLP activation of x + bias. add(residual, x, bias): their sum. rotate(q, k, cos, sin): rotary
    embedding. statistics, softmax_gradient: see below. A bias may be None.
    """

    def __init__(self, model: ModelConfig, training: TrainingConfig) -> None:
        self.compiled = training.compile
        self._options: dict[str, Any] = {"deterministic": True} if training.deterministic else {}
        if self.compiled:
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, COMPILATIONS)
        activations = {
            "gelu": _compiled_gelu if self.compiled else _gelu,
            "gelu_tanh": _gelu_tanh,
            "swiglu": _swiglu,
        }
        self.activation = self._made(activations[model.activation])
        self.add = self._made(_add)
        self.rotate = self._compiled(_rotate) if self.compiled else _rotate
        self.statistics = self._made(_statistics)
        self.softmax_gradient = self._made(_softmax_gradient)
        self._two_norms = self._made(_two_norms)
        self._add_and_norm = self._made(_add_and_norm)
        self._norm = self._made(_norm)
        self._add_three = self._made(_add_three)

    def _made(self, function: Callable) -> Callable:
        """A function of tensors [..., H] as it is, or compiled for so many tokens."""
        return _by_token(self._compiled(function)) if self.compiled else function

    def _compiled(self, function: Callable) -> Callable:
        """A function compiled for the very shapes it is called with."""
        return torch.compile(function, fullgraph=True, dynamic=False, options=self._options)

    def norm(self, x: Tensor, norm: torch.nn.Module) -> Tensor:
        """norm(x)."""
        return self._norm(x, *_settings(norm)) if self.compiled else norm(x)

    def two_norms(self, x: Tensor, first: torch.nn.Module, second: torch.nn.Module) -> tuple[Tensor, Tensor]:
        """first(x) and second(x)."""
        if not self.compiled:
            return first(x), second(x)
        return self._two_norms(x, _settings(first), _settings(second))

    def add_and_norm(
        self, residual: Tensor, x: Tensor, bias: Tensor | None, norm: torch.nn.Module
    ) -> tuple[Tensor, Tensor]:
        """The sum of residual, x and bias, and norm of it."""
        if self.compiled:
            return self._add_and_norm(residual, x, bias, _settings(norm))
        total = _add(residual, x, bias)
        return total, norm(total)

    def add_both(self, residual: Tensor, x: Tensor, x_bias: Tensor | None, y: Tensor, y_bias: Tensor | None) -> Tensor:
        """The sum of residual, x and y with the biases of x and y, of which both or neither is None."""
        if not self.compiled or x_bias is None or y_bias is None:
            return self.add(self.add(residual, x, x_bias), y, y_bias)
        # Both biases have the same gradient: their sum outside gets it by one reduction, in fp32. (Written to two
        # results in half precision, it becomes C++ that does not compile in torch 2.13.)
        return self._add_three(residual, x, y, x_bias.float() + y_bias.float())


def _by_token(function: Callable) -> Callable:
    """`function` of tensors [tokens, ...] for tensors [S, B, ...]. Anything else it takes has at most one axis."""

    def call(*arguments: Any) -> Any:
        leading = arguments[0].shape[:-1]
        if len(leading) < 2:
            return function(*arguments)
        flat = (x.flatten(0, -2) if isinstance(x, Tensor) and x.dim() > 1 else x for x in arguments)
        found = function(*flat)
        if isinstance(found, Tensor):
            return found.unflatten(0, leading)
        return tuple(x.unflatten(0, leading) for x in found)

    return call


_NormSettings = tuple[Tensor, Tensor | None, float]


def _settings(norm: Any) -> _NormSettings:
    """Weight, bias (None of an RMSNorm) and epsilon of a norm."""
    return norm.weight, getattr(norm, "bias", None), norm.eps


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, epsilon)
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def _two_norms(x: Tensor, first: _NormSettings, second: _NormSettings) -> tuple[Tensor, Tensor]:
    return _norm(x, *first), _norm(x, *second)


def _add_and_norm(residual: Tensor, x: Tensor, bias: Tensor | None, norm: _NormSettings) -> tuple[Tensor, Tensor]:
    total = _add(residual, x, bias)
    return total, _norm(total, *norm)


def _add(residual: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return residual + _biased(x, bias)


def _add_three(residual: Tensor, x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    return (residual + x + y + bias).to(residual.dtype)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


def _gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    return F.gelu(_biased(x, bias))


def _gelu_tanh(x: Tensor, bias: Tensor | None) -> Tensor:
    return F.gelu(_biased(x, bias), approximate="tanh")


def _compiled_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """In half precision torch's erf takes longer than the memory that it reads and writes."""
    total = _biased(x, bias)
    return F.gelu(total) if total.dtype == torch.float32 else _HalfGelu.apply(total)


class _HalfGelu(torch.autograd.Function):
    """x Phi(x) with Phi the normal distribution, to 2.2e-7, and to 5e-4 of itself down to x = -4.

    That is below half precision's own error.

    Phi(-|x|) = density(x) p(t), t = 1 / (1 + 0.2316419 |x|), by formula 26.2.17 of Abramowitz and Stegun 1964,
    "Handbook of Mathematical Functions": no branches, and the density is what the gradient needs too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = x.float()
        return (wide * normal(wide)[0]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        wide = x.float()
        distribution, density = normal(wide)
        return (gradient.float() * (distribution + wide * density)).to(x.dtype)


def normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Normal distribution and its density at x, fp32."""
    density = torch.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
    t = 1.0 / (1.0 + 0.2316419 * x.abs())
    series = t * TAIL[-1]
    for coefficient in TAIL[-2::-1]:
        series = (series + coefficient) * t
    tail = density * series
    return torch.where(x < 0, tail, 1.0 - tail), density


def _swiglu(x: Tensor, bias: Tensor | None) -> Tensor:
    gate, up = _biased(x, bias).chunk(2, -1)
    return F.silu(gate) * up


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotate_one(q, cos, sin), rotate_one(k, cos, sin)


def rotate_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first features of x [S, B, H, D], as many as cos and sin [S, 1 or B, 1, R] have, in halves
    (GPT-NeoX)."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    return torch.cat((turned * cos + torch.cat((-second, first), -1) * sin, rest), -1)


def _statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row of logits [T, V], all of them finite, and sum of exp(logits - maximum), fp32 [T].

    Two passes: the one that a compiler makes of a softmax took 1.3 times as long on an H200 (65,536 x 50,304).
    """
    wide = logits.float()
    maximum = wide.amax(-1)
    return maximum, (wide - maximum[:, None]).exp_().sum(-1)


def _softmax_gradient(logits: Tensor, maximum: Tensor, factor: Tensor) -> Tensor:
    """exp(logits - maximum) * factor in the type of logits [T, V]; maximum and factor fp32 [T]."""
    return (logits.float() - maximum[:, None]).exp_().mul_(factor[:, None]).to(logits.dtype)

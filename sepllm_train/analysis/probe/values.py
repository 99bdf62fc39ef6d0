"""Interventions: the values that far separators hand to a query are replaced, everything else stays.

Attention is linear in the values. For query i and separator j at a distance of the window or more, with p(i, j) the
softmax over all keys that i sees (learned sink included), the output changes by

    sum over such j of p(i, j) (v'(j) - v(j))

with v' the value put in the place of v. Queries that see j as a neighbour get v. Keys, and so p, are those of the model
itself, layer by layer. Shape letters: S tokens, H heads, N key/value heads, D features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from sepllm_train.analysis.mass import Scores
from sepllm_train.model.attention import SeparatorAttention
from sepllm_train.model.gpt import SepGPTModel
from sepllm_train.runs.evaluate import core_attentions

# Values of the tokens of a sequence in each layer, [S, N, D] each.
Values = list[Tensor]


@contextmanager
def recording(model: SepGPTModel) -> Iterator[Values]:
    """Gives a list that a forward pass of one sequence inside the block fills with the values of each layer."""
    values: Values = []

    def before(core: SeparatorAttention, inputs: tuple[Tensor, ...], settings: dict[str, Any]) -> None:
        values.append(inputs[2][:, 0].clone())

    with ExitStack() as stack:
        for core in core_attentions(model):
            stack.callback(core.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield values


@contextmanager
def replacing(model: SepGPTModel, values: Sequence[Tensor], chosen: Tensor) -> Iterator[None]:
    """Let far queries read `values` [S, N, D] of each layer at the keys `chosen`, bool [S], inside the block.

    For forward passes of one sequence. A query at a distance below its layer's window reads the key's own value.
    """
    with ExitStack() as stack:
        for core, replaced in zip(core_attentions(model), values, strict=True):
            hook = _corrected(replaced, chosen)
            stack.callback(core.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _corrected(replaced: Tensor, chosen: Tensor) -> Callable[..., Tensor]:
    """The hook that changes a layer's output [S, 1, H * D] by what the replaced values change."""

    def after(core: SeparatorAttention, inputs: tuple[Tensor, ...], settings: dict[str, Any], out: Tensor) -> Tensor:
        change = ((replaced - inputs[2][:, 0]) * chosen[:, None, None]).transpose(0, 1).float()  # [N, S, D]
        weight, _ = Scores.of(core, inputs, settings).rows(0, len(out))
        position = torch.arange(len(out), device=out.device)
        weight *= position[:, None] - position >= core.layer.window
        changed = weight @ change.repeat_interleave(len(weight) // len(change), 0)  # [H, S, D]
        return out + changed.transpose(0, 1).flatten(1)[:, None].to(out.dtype)

    return after


def donors_elsewhere(classes: Tensor, chosen: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """For each chosen key the position of a separator of its class in another sequence, i64 [S].

    classes: u8 [S] of this sequence; chosen: bool [S]; other: u8 [S'] classes of the other one, 0 where a token can be
    no donor. Drawn at random; where the other sequence has none of the class, among all that it has. -1 where a key is
    not chosen or the other sequence has no donor at all.
    """
    donors = torch.full((len(classes),), -1)
    every = other.nonzero()[:, 0]
    for number in classes[chosen].unique().tolist():
        same = (other == number).nonzero()[:, 0]
        pool = same if len(same) else every
        mine = (chosen & (classes == number)).nonzero()[:, 0]
        if len(pool):
            donors[mine] = pool[torch.randint(len(pool), (len(mine),), generator=generator)]
    return donors


def donors_before(classes: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """For each chosen key the position of an earlier chosen one of its class in the same sequence, i64 [S].

    Earlier, so that no query learns of what comes after it. -1 for the first of a class and where none is chosen.
    """
    donors = torch.full((len(classes),), -1)
    for number in classes[chosen].unique().tolist():
        mine = (chosen & (classes == number)).nonzero()[:, 0]
        if len(mine) > 1:
            place = torch.rand(len(mine) - 1, generator=generator) * torch.arange(1, len(mine))
            donors[mine[1:]] = mine[place.long()]
    return donors


def taken(values: Values, donors: Tensor, own: Values) -> Values:
    """Values of each layer with those at position donors[j] of `values` at j; `own` where donors[j] is -1."""
    there = (donors >= 0)[:, None, None]
    return [torch.where(there, layer[donors.clamp(min=0)], mine) for layer, mine in zip(values, own, strict=True)]

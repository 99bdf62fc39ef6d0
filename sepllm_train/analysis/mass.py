"""Attention probabilities of a trained model, summed by what kind of key they fall on and how far back it lies.

Shape letters: S tokens, R queries of a block, H heads, D features of a head, K kinds of keys, E distance ranges,
L layers, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from sep_attention import AttentionPlan
from sep_attention.plan import effective_reach
from torch import Tensor

from data_prep.separators import CLASSES
from sepllm_train.model.attention import SeparatorAttention
from sepllm_train.model.gpt import SepGPTModel
from sepllm_train.model.pattern import AttentionPattern, LayerPattern
from sepllm_train.model.sequence import SeparatorSequence
from sepllm_train.runs.evaluate import core_attentions

# Kinds of keys: 0 ordinary, then the number of the separator class, then the initial tokens.
INITIAL = len(CLASSES) + 1
KINDS = INITIAL + 1
# Probabilities that are held at once: 64 MiB in fp32 and as much again twice for their sums.
BLOCK_ELEMENTS = 1 << 24


@dataclass
class Mass:
    """Mean attention of a query, over all queries of each sample.

    `mass` f64 [N, L, H, K, E]: probability that falls on keys of a kind at a distance of edges[e] to edges[e+1] - 1.
    `uniform` f64 [N, L, K, E]: the same if every query spread itself evenly over the keys it sees. `sink` f64
    [N, L, H]: probability of the learned sink. For each head mass.sum((-1, -2)) + sink is 1. `edges`: E + 1 distances,
    from 0; `layers` and `heads` are those that were looked at; `shares` f64 [N, K], share of the tokens of each kind.
    """

    layers: list[int]
    heads: list[int]
    edges: list[int]
    mass: Tensor
    uniform: Tensor
    sink: Tensor
    shares: Tensor


@dataclass
class KeysByKind:
    """The keys of a sequence sorted by kind, so that keys of a kind in a range of distances stand side by side.

    `order` i64 [S]: positions, sorted by kind and then by place. `bounds` [K, S + 1]: place in `order` of the first
    key of a kind at or after a position.
    """

    order: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, kind: Tensor) -> KeysByKind:
        """From the kind of each key, i64 [S]."""
        member = kind == torch.arange(KINDS, device=kind.device)[:, None]
        before = torch.zeros(KINDS, len(kind) + 1, dtype=torch.int64, device=kind.device)
        torch.cumsum(member, 1, out=before[:, 1:])
        first = before[:, -1].cumsum(0) - before[:, -1]
        return cls(torch.argsort(kind, stable=True), before + first[:, None])

    def sums(self, values: Tensor, start: int, edges: Tensor) -> Tensor:
        """Sums of `values` [H, R, S] over the queries start...start + R - 1 and the keys of a kind and range.

        Gives f64 [H, K, E]. Values of keys after their query must be 0. Prefix sums along the sorted keys are taken
        once; each kind and range is the difference of two of them.
        """
        heads, queries, _ = values.shape
        running = torch.zeros(heads, queries, len(self.order) + 1, dtype=torch.float64, device=values.device)
        torch.cumsum(values[..., self.order], -1, dtype=torch.float64, out=running[..., 1:])
        # Keys at a distance of at least e lie before i - e + 1.
        query = torch.arange(start, start + queries, device=values.device)[:, None]
        places = self.bounds[:, (query - edges + 1).clamp(min=0)]  # [K, R, E + 1]
        flat = places.permute(1, 0, 2).reshape(1, queries, -1).expand(heads, -1, -1)
        found = running.gather(2, flat).view(heads, queries, KINDS, len(edges))
        return (found[..., :-1] - found[..., 1:]).sum(1)


def kinds_of(classes: Tensor, document_start: Tensor, pattern: AttentionPattern, initial: int) -> Tensor:
    """Kind of each key, i64 [S], from class u8 [S] and start of the document i32 [S].

    The first `initial` tokens are INITIAL whatever their class: of the sequence, or of each document where the pattern
    separates documents.
    """
    position = torch.arange(len(classes), device=classes.device)
    place = position - document_start if pattern.separate_documents else position
    return torch.where(place < initial, INITIAL, classes.long())


def distance_edges(length: int, window: int) -> list[int]:
    """Edges of the distance ranges: 0, 1, 2, 4, ... up to S, and the window, so that it splits no range."""
    doubling = {0, *(1 << power for power in range(length.bit_length()))}
    return [*sorted(edge for edge in doubling | {window} if edge < length), length]


def visible_rows(plan: AttentionPlan, layer: LayerPattern, start: int, stop: int) -> Tensor:
    """bool [stop - start, S]: the keys that queries start...stop - 1 of a plan's first sequence see.

    The rows of `sep_attention.visible_mask`, without the others of its S x S. Raises ValueError as that does.
    """
    reaches = [layer.window, *effective_reach(plan, layer.window, layer.horizons)]
    reach = torch.tensor(reaches, device=plan.tier.device)[plan.tier[0].long()]
    position = torch.arange(plan.sequence_length, device=plan.tier.device)
    distance = position[start:stop, None] - position
    visible = (distance >= 0) & (distance < reach)
    if plan.document_start is not None:
        visible &= plan.document_start[0, start:stop, None] == plan.document_start[0]
    return visible


def probabilities(query: Tensor, key: Tensor, visible: Tensor, scale: float, sink: Tensor | None) -> Tensor:
    """Softmax over visible keys in fp32, [H, R, S]. query [H, R, D], key [H, S, D], visible bool [R, S], sink [H]."""
    scores = (query.float() @ key.float().transpose(-1, -2)) * scale
    scores.masked_fill_(~visible, float("-inf"))
    if sink is None:
        return scores.softmax(-1)
    column = sink.float()[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1]


@dataclass
class Scores:
    """Queries and keys of a layer for one sequence, taken in front of its core attention.

    `query`, `key` [H, S, D]: rotated, a key head repeated for each query head of its group. `sink` [H]: the
    learned one, None without.
    """

    layer: LayerPattern
    plan: AttentionPlan
    query: Tensor
    key: Tensor
    scale: float
    sink: Tensor | None

    @classmethod
    def of(cls, core: SeparatorAttention, inputs: tuple[Tensor, ...], settings: dict[str, Any]) -> Scores:
        """From what a hook of the core attention gets, of a batch of one."""
        sequence: SeparatorSequence = settings["packed_seq_params"]
        plan = sequence.plan
        assert isinstance(plan, AttentionPlan)
        query, key = (x[:, 0].transpose(0, 1) for x in core.rotated(inputs[0], inputs[1], sequence))
        key = key.repeat_interleave(len(query) // len(key), 0)
        scale = query.shape[-1] ** -0.5 if core.scale is None else core.scale
        return cls(core.layer, plan, query, key, scale, core.sink)

    def of_heads(self, heads: Sequence[int]) -> Scores:
        """Those of some of the heads."""
        sink = None if self.sink is None else self.sink[heads]
        return replace(self, query=self.query[heads], key=self.key[heads], sink=sink)

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Probabilities [H, R, stop] of queries start...stop - 1, and what they see, bool [R, stop].

        No query of these sees a key from `stop` on.
        """
        visible = visible_rows(self.plan, self.layer, start, stop)[:, :stop]
        return probabilities(self.query[:, start:stop], self.key[:, :stop], visible, self.scale, self.sink), visible


@dataclass
class _Collector:
    """Adds up the attention of one sample as its forward pass goes through the layers."""

    mass: Mass
    kind: Tensor
    sample: int
    edges: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.edges = torch.tensor(self.mass.edges, device=self.kind.device)

    def layer(self, place: int) -> Callable[..., None]:
        """Hook to call before the attention of the layer whose results go to `place`."""

        def before(core: SeparatorAttention, inputs: tuple[Tensor, ...], settings: dict[str, Any]) -> None:
            self._add(place, Scores.of(core, inputs, settings).of_heads(self.mass.heads))

        return before

    def _add(self, place: int, scores: Scores) -> None:
        """Blocks of queries of one layer. The even attention goes along as one more head."""
        heads, length, _ = scores.query.shape
        rows = max(1, BLOCK_ELEMENTS // ((heads + 1) * length))
        for start in range(0, length, rows):
            stop = min(start + rows, length)
            found, visible = scores.rows(start, stop)
            even = visible / visible.sum(-1, keepdim=True)
            keys = KeysByKind.of(self.kind[:stop])
            sums = keys.sums(torch.cat((found, even[None])), start, self.edges).cpu() / length
            self.mass.mass[self.sample, place] += sums[:-1]
            self.mass.uniform[self.sample, place] += sums[-1]
        self.mass.sink[self.sample, place] = 1 - self.mass.mass[self.sample, place].sum((-1, -2))
        if scores.sink is None:
            self.mass.sink[self.sample, place] = 0


@torch.no_grad()
def attention_mass(
    model: SepGPTModel,
    pattern: AttentionPattern,
    dataset: Any,
    samples: int,
    *,
    window: int,
    initial: int,
    layers: Sequence[int],
    heads: Sequence[int],
    advance: Callable[[], object] = lambda: None,
) -> Mass:
    """Attention of the first `samples` samples, from the queries and keys that reach each layer's core attention.

    `pattern` is that of the model; its exact mask is used. `window` and `initial` only decide how keys are sorted into
    kinds and ranges. Probabilities are computed anew in fp32, a block of queries at a time, so memory grows with S and
    not with its square. Calls `advance` after each sample.
    """
    device = next(model.parameters()).device
    length = len(dataset[0]["tokens"])
    edges = distance_edges(length, window)
    shape = (samples, len(layers), len(heads))
    mass = Mass(
        list(layers),
        list(heads),
        edges,
        torch.zeros(*shape, KINDS, len(edges) - 1, dtype=torch.float64),
        torch.zeros(*shape[:2], KINDS, len(edges) - 1, dtype=torch.float64),
        torch.zeros(shape, dtype=torch.float64),
        torch.zeros(samples, KINDS, dtype=torch.float64),
    )
    for number in range(samples):
        sample = {key: value[None].to(device) for key, value in dataset[number].items()}
        kind = kinds_of(sample["separator_class"][0], sample["document_start"][0], pattern, initial)
        mass.shares[number] = torch.bincount(kind, minlength=KINDS).cpu() / length
        plan = pattern.plan(sample["separator_class"], sample["document_start"])
        with _watched(model, _Collector(mass, kind, number)):
            model(sample["tokens"], plan, positions=pattern.positions(sample["document_start"]))
        advance()
    return mass


@contextmanager
def _watched(model: SepGPTModel, collector: _Collector) -> Iterator[None]:
    """Let `collector` see what reaches the attention of its layers, inside the block."""
    cores = core_attentions(model)
    handles = [
        cores[layer].register_forward_pre_hook(collector.layer(place), with_kwargs=True)
        for place, layer in enumerate(collector.mass.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

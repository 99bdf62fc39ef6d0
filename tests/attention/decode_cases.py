"""Decoding cases and an oracle of the cache in plain lists, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from sep_attention import FOREVER, DecodeCache, advance, attend, write
from torch import Tensor

# `reach` of each vocabulary entry: ordinary ones, separators for ever and for some tokens.
REACH = torch.tensor([0, 0, 0, FOREVER, 9, 30], dtype=torch.int32)


class Ops(NamedTuple):
    """The three functions of a step, of one implementation."""

    advance: Callable[[DecodeCache, Tensor, Tensor], None]
    write: Callable[[DecodeCache, int, Tensor, Tensor], None]
    attend: Callable[[DecodeCache, int, Tensor, float], Tensor]


PUBLIC = Ops(advance, write, attend)


@dataclass(frozen=True)
class DecodeCase:
    """Everything that decides a run of steps; tensors follow from the seed. rotary=None: keys keep their position."""

    capacity: int = 12
    initial: int = 2
    separators: int = 3
    window: int = 3
    layers: int = 2
    batch: int = 3
    kv_heads: int = 2
    groups: int = 2
    width: int = 8
    rotary: int | None = 6
    steps: int = 10
    seen: int = 0
    seed: int = 0
    dtype: torch.dtype = field(default=torch.float32, compare=False)

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.width**-0.5

    def frequencies(self) -> Tensor | None:
        """f32 [R / 2], from one radian downwards."""
        return None if self.rotary is None else 10.0 ** -torch.linspace(0, 2, self.rotary // 2)

    def empty(self, device: str = "cpu") -> DecodeCache:
        """The cache before its first token."""
        return DecodeCache.allocate(
            self.layers,
            self.batch,
            self.kv_heads * self.groups,
            self.kv_heads,
            self.capacity,
            self.width,
            initial=self.initial,
            separators=self.separators,
            window=self.window,
            dtype=self.dtype,
            device=device,
            inverse_frequencies=self.frequencies(),
        )

    def tokens(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of each step the ids [B], keys before rotation and values [L, B, G, D] and queries [L, B, H, D]; float64."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(heads: int) -> Tensor:
            return torch.randn(self.layers, self.batch, heads, self.width, generator=generator, dtype=torch.float64)

        for _ in range(self.steps):
            ids = torch.randint(len(REACH), (self.batch,), generator=generator)
            yield ids, draw(self.kv_heads), draw(self.kv_heads), draw(self.kv_heads * self.groups)


def rotated(keys: Tensor, position: int, frequencies: Tensor | None) -> Tensor:
    """Keys [..., D] turned by a position: pairs (i, i + R / 2) as complex numbers, in float64."""
    if frequencies is None:
        return keys
    half = len(frequencies)
    pairs = torch.complex(keys[..., :half].double(), keys[..., half : 2 * half].double())
    pairs = pairs * torch.exp(1j * position * frequencies.double())
    return torch.cat((pairs.real, pairs.imag, keys[..., 2 * half :].double()), -1)


class Token(NamedTuple):
    """A kept token: keys as they are before rotation and values, [L, G, D], as far as the dtype holds them."""

    reach: int
    position: int
    keys: Tensor
    values: Tensor


class OracleRow:
    """One row by the definition: a list of tokens that is cut before the append when it is full."""

    def __init__(self, case: DecodeCase, tokens: list[Token], seen: int) -> None:
        self.case, self.tokens, self.seen = case, tokens, seen

    def append(self, reach: int, keys: Tensor, values: Tensor) -> None:
        """Takes a token after making room for it."""
        case, tokens = self.case, self.tokens
        if len(tokens) == case.capacity:
            end = len(tokens) - (case.window - 1)
            past = [token for token in tokens[case.initial : end] if token.reach > self.seen - token.position]
            past = past[max(0, len(past) - case.separators) :]
            self.tokens = tokens[: case.initial] + past + tokens[end:]
        self.tokens.append(Token(reach, self.seen, keys, values))
        self.seen += 1

    def keys(self) -> Tensor:
        """[L, G, N, D], each rotated to its place in the list."""
        frequencies = self.case.frequencies()
        return torch.stack([rotated(token.keys, i, frequencies) for i, token in enumerate(self.tokens)], 2)

    def values(self) -> Tensor:
        """[L, G, N, D]."""
        return torch.stack([token.values for token in self.tokens], 2)

    def attend(self, queries: Tensor) -> Tensor:
        """[L, H, D] for queries [L, H, D]."""
        keys, values = (x.repeat_interleave(self.case.groups, 1) for x in (self.keys(), self.values()))
        scores = torch.einsum("lhd,lhnd->lhn", queries, keys) * self.case.scale
        return torch.einsum("lhn,lhnd->lhd", scores.softmax(-1), values)


def ragged(case: DecodeCase, device: str = "cpu") -> tuple[DecodeCache, list[OracleRow]]:
    """A cache whose rows hold 0 .. C keys, with gaps between their positions, and the same rows of the oracle."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    cache, rows = case.empty(device), []
    frequencies = case.frequencies()
    for row in range(case.batch):
        count = int(torch.randint(case.capacity + 1, (), generator=generator)) if row else case.capacity
        gaps = torch.randint(1, 4, (count,), generator=generator).cumsum(0)
        seen = case.seen + int(gaps[-1]) + 1 if count else case.seen
        tokens = []
        for slot in range(count):
            keys, values = torch.randn(2, case.layers, case.kv_heads, case.width, generator=generator).to(case.dtype)
            reach, position = int(REACH[slot % len(REACH)]), case.seen + int(gaps[slot])
            tokens.append(Token(reach, position, keys.double(), values.double()))
            cache.values[:, row, :, slot] = values.to(device)
            arrived = rotated(keys, slot, frequencies).to(device, case.dtype)
            for stored in (cache.keys, cache.arrived):
                if stored is not None:
                    stored[:, row, :, slot] = arrived
            cache.reach[row, slot], cache.position[row, slot], cache.arrival[row, slot] = reach, position, slot
        cache.length[row], cache.seen[row] = count, seen
        rows.append(OracleRow(case, tokens, seen))
    return cache, rows


def step(case: DecodeCase, cache: DecodeCache, ops: Ops, token: tuple[Tensor, ...]) -> Tensor:
    """One step of all layers; the attention [L, B, H, D]. The new key is rotated to its slot, as a model does it."""
    ids, keys, values, queries = token
    ops.advance(cache, ids.to(cache.keys.device), REACH.to(cache.keys.device))
    slots, frequencies = (cache.length - 1).tolist(), case.frequencies()
    keys = torch.stack([rotated(keys[:, row], slot, frequencies) for row, slot in enumerate(slots)], 1)
    keys, values, queries = (x.to(cache.keys.device, case.dtype) for x in (keys, values, queries))
    outputs = []
    for layer in range(case.layers):
        ops.write(cache, layer, keys[layer], values[layer])
        outputs.append(ops.attend(cache, layer, queries[layer], case.scale))
    return torch.stack(outputs)


def check_against_oracle(case: DecodeCase, ops: Ops, tolerance: float) -> None:
    """Runs the steps of a case from ragged rows; after each, all that a row holds and attends to is the oracle's."""
    cache, rows = ragged(case)
    for token in case.tokens():
        ids, keys, values, queries = token
        out = step(case, cache, ops, token)
        for number, row in enumerate(rows):
            row.append(int(REACH[ids[number]]), keys[:, number], values[:, number])
            count = len(row.tokens)
            assert (int(cache.length[number]), int(cache.seen[number])) == (count, row.seen)
            assert cache.reach[number, :count].tolist() == [token.reach for token in row.tokens]
            assert cache.position[number, :count].tolist() == [token.position for token in row.tokens]
            compare = {"keys": (cache.keys[:, number, :, :count], row.keys())}
            compare["values"] = (cache.values[:, number, :, :count], row.values())
            compare["attention"] = (out[:, number], row.attend(queries[:, number]))
            for name, (actual, expected) in compare.items():
                worst = float((actual.double() - expected).abs().max())
                assert worst <= tolerance, f"{name} of row {number} are off by {worst:.1e}, allowed {tolerance:.0e}"


def copied(cache: DecodeCache) -> DecodeCache:
    """A cache of its own tensors with the same content."""
    tensors = {name: value.clone() for name, value in vars(cache).items() if isinstance(value, Tensor)}
    return replace(cache, **tensors)


def filled(cache: DecodeCache, name: str) -> Tensor:
    """What an attribute holds in the slots of keys: [N] of all rows, or [N, L, G, D]."""
    tensor = getattr(cache, name)
    mask = torch.arange(cache.capacity, device=cache.length.device) < cache.length[:, None]
    return (tensor if tensor.dim() == 2 else tensor.permute(1, 3, 0, 2, 4))[mask]


@st.composite
def decode_cases(draw: st.DrawFn, steps: int) -> DecodeCase:
    """Any legal case of a few slots, often full."""
    initial, separators, window = draw(st.integers(0, 3)), draw(st.integers(0, 4)), draw(st.integers(1, 5))
    width = 2 * draw(st.integers(1, 4))
    return DecodeCase(
        capacity=initial + separators + window + draw(st.integers(1, 8)),
        initial=initial,
        separators=separators,
        window=window,
        layers=draw(st.integers(1, 2)),
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 3)),
        width=width,
        rotary=draw(st.one_of(st.none(), st.integers(1, width // 2).map(lambda half: 2 * half))),
        steps=steps,
        seen=draw(st.sampled_from([0, 2**31 - 20, 2**40])),
        seed=draw(st.integers(0, 10_000)),
    )

"""The compiled kernels of the decoding cache on a GPU: precision, steps, CUDA graphs, determinism, no allocation."""

from __future__ import annotations

import pytest
import torch
from sep_attention import DecodeCache, advance, attend, write
from torch import Tensor

from tests.attention.decode_cases import PUBLIC, REACH, DecodeCase, copied, filled, ragged, step
from tests.support.triton_support import NO_TRITON

pytest.importorskip("triton", reason=NO_TRITON)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

HALF = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


def _random(case: DecodeCase) -> tuple[DecodeCache, Tensor]:
    """A cache of any length below and at C, garbage past the last key, and queries."""
    generator = torch.Generator("cuda").manual_seed(case.seed)
    cache = case.empty("cuda")
    for stored in (cache.keys, cache.values):
        stored.normal_(generator=generator)
    cache.length.copy_(torch.randint(1, case.capacity + 1, (case.batch,), generator=generator, device="cuda"))
    cache.length[0] = case.capacity
    past = torch.arange(case.capacity, device="cuda") >= cache.length[:, None]
    for stored in (cache.keys, cache.values):
        stored.masked_fill_(past[None, :, None, :, None], float("nan"))
    shape = case.batch, case.kv_heads * case.groups, case.width
    return cache, torch.randn(shape, generator=generator, device="cuda").to(case.dtype)


def _exact(case: DecodeCase, cache: DecodeCache, layer: int, query: Tensor) -> Tensor:
    rows = []
    for row, length in enumerate(cache.length.tolist()):
        keys, values = (x[layer, row, :, :length].double() for x in (cache.keys, cache.values))
        keys, values = (x.repeat_interleave(case.groups, 0) for x in (keys, values))
        scores = torch.einsum("hd,hnd->hn", query[row].double(), keys) * case.scale
        rows.append(torch.einsum("hn,hnd->hd", scores.softmax(-1), values))
    return torch.stack(rows)


@pytest.mark.parametrize("capacity", [40, 512, 513, 800, 4096])
@pytest.mark.parametrize(("width", "groups"), [(64, 1), (64, 4), (80, 1), (128, 1), (128, 8), (128, 20), (256, 2)])
@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
def test_attention(dtype: torch.dtype, width: int, groups: int, capacity: int) -> None:
    case = DecodeCase(capacity, width=width, groups=groups, batch=5, rotary=None, dtype=dtype)
    cache, query = _random(case)
    exact, ours = _exact(case, cache, 1, query), attend(cache, 1, query, case.scale)
    assert float((ours.double() - exact).norm() / exact.norm()) <= HALF[dtype]
    assert torch.equal(ours, attend(cache, 1, query, case.scale))


@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 1e-5), ("high", 5e-3)], ids=["ieee", "tf32"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_attention_in_float32(width: int, precision: str, tolerance: float) -> None:
    case = DecodeCase(800, width=width, groups=4, rotary=None)
    cache, query = _random(case)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        ours = attend(cache, 0, query, case.scale)
    finally:
        torch.set_float32_matmul_precision(before)
    exact = _exact(case, cache, 0, query)
    assert float((ours.double() - exact).norm() / exact.norm()) <= tolerance


def test_a_row_does_not_depend_on_the_others() -> None:
    case = DecodeCase(1000, width=64, groups=4, batch=8, rotary=None, dtype=torch.bfloat16)
    cache, query = _random(case)
    whole = attend(cache, 0, query, case.scale)
    alone = DecodeCase(1000, width=64, groups=4, batch=1, rotary=None, dtype=torch.bfloat16).empty("cuda")
    for name in ("keys", "values"):
        getattr(alone, name).copy_(getattr(cache, name)[:, 5:6])
    alone.length.copy_(cache.length[5:6])
    assert torch.equal(attend(alone, 0, query[5:6], case.scale), whole[5:6])


STEPS = {
    "few-slots": DecodeCase(steps=60),
    "training-positions": DecodeCase(rotary=None, steps=60),
    "head-80": DecodeCase(60, 3, 20, 20, width=80, rotary=20, steps=100),
    "tiles-that-move": DecodeCase(700, 3, 400, 150, width=64, rotary=64, steps=160),
    "many-slots": DecodeCase(5000, 3, 1000, 3900, width=64, rotary=16, layers=1, batch=2, steps=120),
}


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
def test_steps_are_those_of_a_cpu(case: DecodeCase) -> None:
    (cache, _), (expected, _) = ragged(case, "cuda"), ragged(case)
    compactions = 0
    for token in case.tokens():
        step(case, cache, PUBLIC, token)
        step(case, expected, PUBLIC, token)
        compactions += int((expected.moved > 0).sum())
        for name in ("length", "seen", "moved"):
            assert torch.equal(getattr(cache, name).cpu(), getattr(expected, name)), name
    assert compactions > 0
    for name in ("reach", "position", "arrival"):
        assert torch.equal(filled(cache, name).cpu(), filled(expected, name)), name
    for name in ("keys", "values"):
        torch.testing.assert_close(filled(cache, name).cpu(), filled(expected, name), rtol=1e-5, atol=1e-5)


class _Decoder:
    """Steps on fixed tensors: inputs of each step are made from its number and the cache, on the device."""

    def __init__(self, case: DecodeCase) -> None:
        self.case, self.reach = case, REACH.cuda()
        heads = case.kv_heads * case.groups
        generator = torch.Generator("cuda").manual_seed(0)
        shape = case.layers, case.batch, heads + 2 * case.kv_heads, case.width
        self.joint = torch.randn(shape, generator=generator, device="cuda").to(case.dtype)
        self.out = torch.empty(shape[0], case.batch, heads, case.width, device="cuda", dtype=case.dtype)
        self.ids = torch.zeros(case.batch, device="cuda", dtype=torch.int64)

    def step(self, cache: DecodeCache) -> None:
        """A token; its id follows from the position, its query from the layer below."""
        heads, kv_heads = self.out.shape[2], self.case.kv_heads
        torch.remainder(cache.seen, len(REACH), out=self.ids)
        advance(cache, self.ids, self.reach)
        for layer, joint in enumerate(self.joint):
            query = joint[:, :heads] if layer == 0 else self.out[layer - 1]
            write(cache, layer, joint[:, heads : heads + kv_heads], joint[:, heads + kv_heads :])
            attend(cache, layer, query, self.case.scale, self.out[layer])


GRAPHS = {
    "cache": DecodeCase(128, 4, 20, 40, layers=4, width=64, rotary=16, dtype=torch.bfloat16),
    "training": DecodeCase(128, 4, 20, 40, layers=4, width=64, rotary=None, dtype=torch.bfloat16),
    "parts": DecodeCase(800, 4, 64, 600, layers=2, width=128, rotary=128, groups=4, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("case", GRAPHS.values(), ids=GRAPHS.keys())
def test_a_graph_replays_hundreds_of_steps(case: DecodeCase) -> None:
    start, _ = ragged(case, "cuda")
    decoder, eager, live = _Decoder(case), copied(start), copied(start)
    decoder.step(copied(start))  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step(live)
    expected = []
    for _ in range(300):
        decoder.step(eager)
        expected.append(decoder.out.clone())
    assert int(eager.length.min()) < case.capacity and (eager.arrival.cpu() > 0).any()
    for _ in range(2):
        for name, value in vars(start).items():
            if isinstance(value, Tensor):
                getattr(live, name).copy_(value)
        for number in range(300):
            graph.replay()
            assert torch.equal(decoder.out, expected[number]), number
        for name in ("keys", "values", "position"):
            assert torch.equal(filled(live, name), filled(eager, name)), name


@pytest.mark.parametrize("case", GRAPHS.values(), ids=GRAPHS.keys())
def test_a_step_allocates_nothing(case: DecodeCase) -> None:
    cache, _ = ragged(case, "cuda")
    decoder = _Decoder(case)
    decoder.step(cache)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(100):
        decoder.step(cache)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before

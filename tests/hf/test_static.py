"""Decoding in tensors of fixed shape, against the cache that is not and the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from sepllm_train.base.errors import UserError
from sepllm_train.hf import Decoder, SepCache, StreamingCache, apply_pattern, cache_argument, make_pattern
from tests.hf.tiny_models import SEPARATORS, Oracle, left_padded, random_rows, tiny

SIZES = {"initial": 3, "separators": 5, "window": 6, "capacity": 24}

pytestmark = [
    pytest.mark.filterwarnings("ignore:training-free use"),
    pytest.mark.filterwarnings("error:.*past_key_values.*:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def prompted(model: Any, prompts: list[torch.Tensor], **options: Any) -> SepCache:
    ids, mask = left_padded(prompts)
    cache = SepCache(model, **SIZES, separator_ids=SEPARATORS, **options)
    model(input_ids=ids, attention_mask=mask, **{cache_argument(model): cache})
    return cache


@pytest.mark.parametrize("positions", ["cache", "training"])
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("family", ["neox", "llama", "yarn", "qwen3"])
def test_steps_are_the_oracles(family: str, kernel: bool, positions: str) -> None:
    model, rows = tiny(family), random_rows((100, 73))
    prompts = [row[:-60] for row in rows]
    decoder = Decoder(model, prompted(model, prompts, positions=positions), kernel=kernel)
    pointers = [held.data_ptr() for held in (decoder.cache.slots.keys, decoder.cache.slots.values)]
    steps = torch.stack([row[-60:] for row in rows])
    found = torch.stack([decoder.step(steps[:, step]) for step in range(60)], 1)
    for row, logits in zip(rows, found, strict=True):
        known = Oracle(tiny(family), **SIZES, positions=positions)
        torch.testing.assert_close(logits, known.run(row)[-60:], atol=1e-5, rtol=1e-5)
    assert pointers == [held.data_ptr() for held in (decoder.cache.slots.keys, decoder.cache.slots.values)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["neox", "llama"])
def test_compiled_forward_is_one_graph(family: str) -> None:
    from torch._dynamo.testing import CompileCounter

    model, (row,) = tiny(family), random_rows((80,))
    counter = CompileCounter()
    decoder = Decoder(model, prompted(model, [row[:20]]), kernel=False)
    # On a CPU compiling is refused, as it costs time; with all slots, as on a GPU, the graph must be one all the same.
    decoder._narrow = False
    torch._dynamo.reset()
    decoder._forward = torch.compile(model.forward, backend=counter, fullgraph=True, dynamic=False)
    found = torch.stack([decoder.step(token[None])[0] for token in row[20:]])
    torch.testing.assert_close(found, Oracle(tiny(family), **SIZES).run(row)[20:], atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


def test_a_model_with_a_pattern_decodes_by_the_cache() -> None:
    model, (row,) = tiny("llama"), random_rows((60,))
    apply_pattern(model, make_pattern(model, window=6, initial=3, separators=SEPARATORS))
    decoder = Decoder(model, prompted(model, [row[:30]]))
    found = torch.stack([decoder.step(token[None])[0] for token in row[30:]])
    torch.testing.assert_close(found, Oracle(tiny("llama"), **SIZES).run(row)[30:], atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("family", ["neox", "llama"])
def test_a_cuda_graph_repeats_the_eager_steps(family: str) -> None:
    model, rows = tiny(family, hidden_size=256).cuda(), [row.cuda() for row in random_rows((100, 73))]
    found = {}
    for mode in ("eager", "graph"):
        decoder = Decoder(model, prompted(model, [row[:-60] for row in rows]), mode=mode)
        steps = torch.stack([row[-60:] for row in rows])
        found[mode] = torch.stack([decoder.step(steps[:, step]).clone() for step in range(60)])
    assert torch.equal(found["eager"], found["graph"])


def test_mistakes() -> None:
    model, (row,) = tiny("llama"), random_rows((30,))
    decoder = Decoder(model, prompted(model, [row, row]), kernel=True)
    with pytest.raises(ValueError, match="one token for each of 2 rows"):
        decoder.step(row[:1])
    decoder.step(row[:2])
    model(input_ids=row[None])
    short = tiny("llama", max_position_embeddings=31)
    decoder = Decoder(short, prompted(short, [row], positions="training"))
    decoder.step(row[:1])
    with pytest.raises(ValueError, match="the text is 32 tokens long and the model's context 31"):
        decoder.step(row[:1])
    with pytest.raises(ValueError, match="mode='fast' is unknown"):
        Decoder(model, prompted(model, [row]), mode="fast")
    with pytest.raises(ValueError, match="the cache is empty: let the model take the prompt first"):
        Decoder(model, SepCache(model, **SIZES, separator_ids=SEPARATORS))
    with pytest.raises(ValueError, match="all keep the same keys"):
        Decoder(model, prompted(model, [row], full_layers=[0]))
    with pytest.raises(ValueError, match="goes on with a SepCache"):
        Decoder(model, StreamingCache(model))
    cohere = tiny("cohere")
    with pytest.raises(ValueError, match="pairs neighbouring features"):
        Decoder(cohere, prompted(cohere, [row]))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="mode='graph' needs a CUDA device"):
            Decoder(model, prompted(model, [row]), mode="graph")
        with pytest.raises(UserError, match="mode='compile' is slower than mode='eager' on a CPU: use mode='eager'"):
            Decoder(model, prompted(model, [row]), mode="compile")

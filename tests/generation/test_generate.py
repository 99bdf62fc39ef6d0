"""Generation with our model's own cache: what training's forward gives, and what the definition of a cache gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sep_attention import FOREVER
from torch import Tensor

from data_prep.tokenizers import Tokenizer
from sepllm_train.base.errors import UserError
from sepllm_train.generation.choice import CACHES, AttentionChoice, check_used
from sepllm_train.generation.generate import generate, left_padded
from sepllm_train.generation.native import NativeCache
from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.generation.sampling import Sampling, TextStream
from sepllm_train.generation.slots import CachePolicy
from sepllm_train.model.gpt import SepGPTModel
from sepllm_train.model.pattern import resolve_pattern
from sepllm_train.runs.evaluate import attending
from tests.generation.generate_worker import tensor_parallel_results
from tests.generation.native_models import (
    END,
    RUNS,
    Shown,
    full_logits,
    oracle_logits,
    random_ids,
    run_config,
    token_pattern,
    trained,
)
from tests.model.tiny import VOCABULARY
from tests.support.distributed_runner import run_ranks

GREEDY = Sampling()


def pattern_cache(model: SepGPTModel, pattern: TokenPattern, rows: int = 1, block: int = 7) -> NativeCache:
    """The cache that shows what training showed; `block` cuts prompts."""
    policies = [pattern.policy(layer) for layer in range(len(pattern.windows))]
    return NativeCache(model, pattern, policies, rows, block=block)


def step_by_step(cache: NativeCache, ids: list[int], prompt: int) -> Tensor:
    """Logits [S - prompt + 1, V] after the prompt, and after each further token."""
    fed = [cache.feed(torch.tensor([ids[:prompt]]))]
    fed += [cache.feed(torch.tensor([[token]])) for token in ids[prompt:]]
    return torch.cat(fed)


@pytest.fixture
def _small_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are dropped after a few tokens already."""
    monkeypatch.setattr("sepllm_train.generation.slots.SLACK", 5)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.usefixtures("_small_slack", "grid")
def test_pattern_cache_generates_what_the_full_forward_predicts(name: str) -> None:
    config = run_config(name)
    model, pattern = trained(config), token_pattern(config)
    prompt = random_ids(20)
    (found,) = generate(pattern_cache(model, pattern), [prompt], 50, GREEDY)
    ids = prompt + found.tokens
    full = full_logits(model, pattern, ids)
    assert found.tokens == full[19:-1].argmax(-1).tolist()
    assert not found.ended

    # Texts that are not the model's own, with ends of documents.
    ids = random_ids(70, seed=1)
    ids[5] = ids[30] = ids[31] = ids[50] = END
    full = full_logits(model, pattern, ids)
    cache = pattern_cache(model, pattern)
    torch.testing.assert_close(step_by_step(cache, ids, 33), full[32:], rtol=1e-5, atol=1e-5)
    if name != "dense":
        own = resolve_pattern(config.attention, 4)
        fully = replace(own, layers=tuple(replace(layer, window=FOREVER) for layer in own.layers))
        with attending(model, fully):
            assert (full_logits(model, pattern, ids) - full).abs().max() > 0.1
    if name == "streaming":
        # initial + window + slack is the longest.
        assert cache.mean_lengths()[0] < 11
    if name == "dense":
        assert cache.mean_lengths() == [71 / 2]


@pytest.mark.parametrize("name", ["pythia", "llama, grouped queries, norms, sinks", "documents"])
@pytest.mark.usefixtures("_small_slack", "grid")
def test_each_row_of_a_ragged_batch_is_as_alone(name: str) -> None:
    config = run_config(name)
    model, pattern = trained(config), token_pattern(config)
    prompts = [random_ids(length, seed=length) for length in (3, 17, 26)] + [[END]]
    alone = [generate(pattern_cache(model, pattern), [prompt], 30, GREEDY)[0] for prompt in prompts]
    # A token that ends one row early.
    end = alone[1].tokens[4]
    told: dict[int, list[int]] = {}
    batch = generate(
        pattern_cache(model, pattern, len(prompts)),
        prompts,
        30,
        GREEDY,
        end=end,
        on_token=lambda row, token: told.setdefault(row, []).append(token),
    )
    for row, (one, single) in enumerate(zip(batch, alone, strict=True)):
        expected = single.tokens
        if end in expected:
            expected = expected[: expected.index(end) + 1]
        assert one.tokens == expected == told[row]
        assert one.ended == (end in single.tokens)
        if not one.ended:
            assert one.cache_length == pytest.approx(single.cache_length)


@pytest.mark.parametrize("positions", ["training", "cache"])
@pytest.mark.parametrize("separators", [3, 0], ids=["sep", "streaming"])
@pytest.mark.parametrize("name", ["pythia", "llama, grouped queries, norms, sinks", "fixed interval, sinks", "yarn"])
@pytest.mark.usefixtures("grid")
def test_bounded_caches_equal_plain_lists(name: str, separators: int, positions: str) -> None:
    config = run_config(name)
    model, pattern = trained(config), token_pattern(config)
    policy = CachePolicy(window=4, initial=2, separators=separators, capacity=12)
    ids = random_ids(45, seed=2)
    separator = (pattern.reach(torch.tensor(ids), torch.arange(len(ids))) > 0).tolist()
    shown = Shown.of(policy, separator)
    expected = oracle_logits(model, config, [shown] * 4, ids, pattern, positions)
    cache = NativeCache(model, pattern, [policy] * 4, 1, positions=positions, block=9)
    torch.testing.assert_close(step_by_step(cache, ids, 20), expected[19:], rtol=1e-5, atol=1e-5)
    lengths = [len(keys) for keys in shown.keys]
    assert cache.mean_lengths() == [pytest.approx(sum(lengths) / len(lengths))]
    assert cache.lengths_of_layers() == [[lengths[-1]]] * 4

    # The same in a batch, padded on the left.
    cache = NativeCache(model, pattern, [policy] * 4, 2, positions=positions)
    other = random_ids(31, seed=3)
    logits = cache.feed(*left_padded([ids, other]))
    torch.testing.assert_close(logits[0], expected[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("grid")
def test_bounded_cache_with_full_layers_equals_plain_lists() -> None:
    config = run_config("first and last layer full")
    model, pattern = trained(config), token_pattern(config)
    choice = AttentionChoice("sep", separators=3, window=4, capacity=12).resolve(pattern, None)  # type: ignore[arg-type]
    assert choice.positions == "training"
    assert "initial 2, separators 3, window 4, capacity 12, 2 layers full" in choice.line
    ids = random_ids(45, seed=2)
    separator = (pattern.reach(torch.tensor(ids), torch.arange(len(ids))) > 0).tolist()
    shown = [Shown.of(policy, separator) for policy in choice.policies]
    expected = oracle_logits(model, config, shown, ids, pattern, "training")
    cache = NativeCache(model, choice.pattern, choice.policies, 1)
    torch.testing.assert_close(step_by_step(cache, ids, 20), expected[19:], rtol=1e-5, atol=1e-5)
    assert cache.lengths_of_layers()[0] == [45]
    assert cache.lengths_of_layers()[1][0] <= 12


@pytest.mark.usefixtures("grid")
def test_long_prompts_of_layers_with_sinks_are_cut() -> None:
    config = run_config("llama, grouped queries, norms, sinks")
    model, pattern = trained(config), token_pattern(config)
    ids = random_ids(300)
    full = full_logits(model, pattern, ids)
    logits = NativeCache(model, pattern, [pattern.policy(0)] * 4, 1).feed(torch.tensor([ids]))
    torch.testing.assert_close(logits[0], full[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.distributed
@pytest.mark.usefixtures("grid")
def test_tensor_parallel_ranks_generate_what_one_process_does() -> None:
    both = run_ranks(tensor_parallel_results, 2, tensor=2)
    assert both[0] == both[1]
    expected = tensor_parallel_results(tensor=1)
    for name, found in both[0].items():
        assert found["tokens"] == expected[name]["tokens"], name
        torch.testing.assert_close(
            torch.tensor(found["logits"]), torch.tensor(expected[name]["logits"]), rtol=1e-5, atol=1e-5
        )


@pytest.mark.usefixtures("grid")
def test_sampling_is_reproducible_and_a_row_does_not_depend_on_the_others() -> None:
    config = run_config("pythia")
    model, pattern = trained(config), token_pattern(config)
    prompts = [random_ids(9), random_ids(4, seed=1)]

    def drawn(seed: int, rows: list[list[int]]) -> list[list[int]]:
        sampling = Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=seed)
        return [one.tokens for one in generate(pattern_cache(model, pattern, len(rows)), rows, 25, sampling)]

    first = drawn(1, prompts)
    assert first == drawn(1, prompts)
    assert first != drawn(2, prompts)
    assert first[0] == drawn(1, prompts[:1])[0]
    assert first[1] == drawn(2, prompts[1:])[0]


def test_sampling_draws_from_the_likeliest_tokens_alone() -> None:
    probability = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
    logits = probability.log()[None].expand(400, -1)

    def shares(**settings: Any) -> Tensor:
        sampling = Sampling(temperature=1.0, **settings)
        return sampling.choose(logits, sampling.generators(400)).bincount(minlength=5) / 400

    torch.testing.assert_close(shares(), probability, rtol=0, atol=0.07)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([0, 0.62, 0, 0.38, 0]), rtol=0, atol=0.07)
    assert (shares(top_p=0.7) > 0).tolist() == [False, True, False, True, True]
    assert shares(top_p=0.01)[1] == 1
    assert Sampling().choose(logits[:2], []).tolist() == [1, 1]
    with pytest.raises(UserError, match="not finite"):
        Sampling().choose(torch.tensor([[0.0, float("nan")]]), [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "--temperature -1 must be 0 or more"),
        ({"temperature": 1.0, "top_p": 1.5}, "--top-p 1.5 must be above 0 and at most 1"),
        ({"temperature": 1.0, "top_k": 0}, "--top-k 0 must be at least 1"),
        ({"top_p": 0.5}, "need a --temperature above 0"),
        ({"seed": -1}, "--seed -1 must lie between"),
    ],
)
def test_sampling_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


class ByteTokenizer(Tokenizer):
    """A token is a byte."""

    kind = "bytes"

    def __init__(self) -> None:
        """No file."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """UTF-8."""
        return [list(text.encode()) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """Marks in the place of incomplete characters."""
        return bytes(ids).decode("utf8", "replace")

    def token_bytes(self) -> list[bytes | None]:
        """All of them."""
        return [bytes([byte]) for byte in range(256)]


def test_text_comes_in_whole_characters() -> None:
    text = "naïve 👍🏽, 中文."
    stream = TextStream(ByteTokenizer(), list(b"before "))
    pieces = [stream.add(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.end() == ""
    stream.add(0xE2)
    assert stream.end() == "\ufffd"


@pytest.mark.usefixtures("grid")
def test_what_does_not_fit_is_refused() -> None:
    config = run_config("pythia")
    model, pattern = trained(config), token_pattern(config)
    with pytest.raises(ValueError, match="positions='cache' needs the same capacity in all layers"):
        NativeCache(model, pattern, [pattern.policy(0)] * 4, 1, positions="cache")
    with pytest.raises(ValueError, match="positions='absolute' is unknown"):
        NativeCache(model, pattern, [pattern.policy(0)] * 4, 1, positions="absolute")
    cache = pattern_cache(model, pattern)
    cache.feed(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="pad on the left"):
        cache.feed(torch.tensor([[1, 2]]), torch.tensor([[False, True]]))
    with pytest.raises(ValueError, match=f"token id {VOCABULARY} is beyond"):
        cache.feed(torch.tensor([[VOCABULARY]]))


def test_sizes_that_a_cache_does_not_have_are_refused() -> None:
    with pytest.raises(UserError, match="--window does not apply to pattern: it is for sep, streaming, fixed"):
        check_used([AttentionChoice(window=3)], ["window"], CACHES)
    with pytest.raises(UserError, match="--separators does not apply to streaming: it is for sep, fixed"):
        check_used([AttentionChoice("streaming", separators=3)], ["separators"], CACHES)


def test_sizes_default_to_those_of_training() -> None:
    pattern = token_pattern(run_config("windows"))
    sep = AttentionChoice("sep").resolve(pattern, None)  # type: ignore[arg-type]
    assert sep.policies == [CachePolicy(window=27, initial=2, separators=64, capacity=186)] * 4
    assert sep.positions == "cache"
    assert sep.line == "cache: sep | initial 2, separators 64, window 27, capacity 186 | positions cache"
    streaming = AttentionChoice("streaming", window=9).resolve(pattern, None)  # type: ignore[arg-type]
    assert streaming.policies[0] == CachePolicy(window=9, initial=2, separators=0, capacity=11)
    assert AttentionChoice("full").resolve(pattern, None).positions == "training"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="capacity=20 must be larger: at least 94"):
        AttentionChoice("sep", capacity=20).resolve(pattern, None)  # type: ignore[arg-type]

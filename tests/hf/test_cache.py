"""The caches against an oracle that is written from the definition, in plain lists."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from sep_attention import FOREVER

from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.hf import (
    FixedCache,
    FullCache,
    PatternCache,
    SepCache,
    StreamingCache,
    attach,
    cache_argument,
    make_pattern,
)
from sepllm_train.hf.separators import CONFIG_KEY
from tests.hf.tiny_models import FAMILIES, SEPARATORS, VOCABULARY, Oracle, left_padded, random_rows, tiny

SIZES = {"initial": 3, "separators": 5, "window": 6, "capacity": 24}
TOLERANCE = 1e-5

pytestmark = [
    pytest.mark.filterwarnings("ignore:training-free use"),
    pytest.mark.filterwarnings("error:.*past_key_values.*:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: tiny(name) for name in ("neox", "llama")}


def sep_cache(model: Any, **sizes: Any) -> SepCache:
    return SepCache(model, **{**SIZES, "separator_ids": SEPARATORS, **sizes})


def oracle(model: Any, **settings: Any) -> Oracle:
    return Oracle(model, **{**SIZES, **settings})


def call(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [B, N, V]."""
    return model(input_ids=ids, attention_mask=mask, **{cache_argument(model): cache}).logits


def in_chunks(model: Any, cache: Any, ids: Tensor, mask: Tensor, cuts: list[int]) -> Tensor:
    """Logits of a batch that is given in several calls, cut at `cuts`."""
    bounds = [0, *cuts, ids.shape[1]]
    pairs = [(a, b) for a, b in itertools.pairwise(bounds) if a < b]
    return torch.cat([call(model, cache, ids[:, a:b], mask[:, :b]) for a, b in pairs], 1)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
@pytest.mark.slow
def test_random_sizes_batches_and_cuts(models: dict[str, Any], data: st.DataObject) -> None:
    model = models[data.draw(st.sampled_from(sorted(models)))]
    initial, separators = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 5))
    window = data.draw(st.integers(1, 8))
    capacity = initial + separators + window + data.draw(st.integers(1, 12))
    sizes = {"initial": initial, "separators": separators, "window": window, "capacity": capacity}
    positions = data.draw(st.sampled_from(["cache", "training"]))
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    rows = random_rows(lengths, data.draw(st.integers(0, 9)))
    rows[0][:: data.draw(st.integers(2, 9))] = SEPARATORS[0]
    ids, mask = left_padded(rows)
    cuts = sorted(data.draw(st.lists(st.integers(1, ids.shape[1]), max_size=4)))
    cache = SepCache(model, **sizes, separator_ids=SEPARATORS, positions=positions, block=data.draw(st.integers(1, 40)))
    logits = in_chunks(model, cache, ids, mask, cuts)
    counted = 0
    for row, (tokens, found) in enumerate(zip(rows, logits, strict=True)):
        known = Oracle(model, **sizes, positions=positions)
        torch.testing.assert_close(found[len(found) - len(tokens) :], known.run(tokens), atol=TOLERANCE, rtol=TOLERANCE)
        assert cache.lengths[row] == known.lengths[-1]
        counted += sum(known.lengths)
    assert cache.mean_length == pytest.approx(counted / sum(lengths))


@pytest.mark.parametrize("positions", ["cache", "training"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, positions: str) -> None:
    """Partial and interleaved rotary embeddings, scaled frequencies, grouped heads, parallel blocks, capped logits."""
    model = tiny(family)
    rows = random_rows((70, 33, 4))
    ids, mask = left_padded(rows)
    logits = in_chunks(model, sep_cache(model, positions=positions), ids, mask, [50, 51])
    for tokens, found in zip(rows, logits, strict=True):
        known = oracle(model, positions=positions).run(tokens)
        torch.testing.assert_close(found[len(found) - len(tokens) :], known, atol=TOLERANCE, rtol=TOLERANCE)
    full = model(input_ids=rows[0][None]).logits[0]
    assert (full - logits[0]).abs().max() > 1e-3, "the cache changes nothing: the test would pass for any"


def test_rivals(models: dict[str, Any]) -> None:
    model, (row,) = models["llama"], random_rows((60,))
    rolling = Oracle(model, initial=4, separators=0, window=12, capacity=16)
    torch.testing.assert_close(
        call(model, StreamingCache(model, 4, 12), row[None])[0], rolling.run(row), atol=1e-5, rtol=1e-5
    )
    lazy = Oracle(model, initial=4, separators=0, window=12, capacity=20)
    found = call(model, StreamingCache(model, 4, 12, 20), row[None])[0]
    torch.testing.assert_close(found, lazy.run(row), atol=1e-5, rtol=1e-5)
    fixed = oracle(model, interval=7)
    found = call(model, FixedCache(model, **SIZES, interval=7), row[None])[0]
    torch.testing.assert_close(found, fixed.run(row), atol=1e-5, rtol=1e-5)
    full = FullCache(model)
    torch.testing.assert_close(call(model, full, row[None]), model(input_ids=row[None]).logits, atol=1e-5, rtol=1e-5)
    assert full.mean_length == 30.5 and full.differences == ()


@pytest.mark.slow
def test_many_moves_do_not_add_up(models: dict[str, Any]) -> None:
    """A separator moves some hundred times before it is dropped."""
    model, (row,) = models["llama"], random_rows((1200,))
    row[::40] = SEPARATORS[0]
    row[row % 4 == 3] = 1
    row[::40] = SEPARATORS[0]
    sizes = {"initial": 2, "separators": 20, "window": 3, "capacity": 26}
    found = call(model, SepCache(model, **sizes, separator_ids=SEPARATORS), row[None])[0]
    known = Oracle(model, **sizes).run(row)
    torch.testing.assert_close(found, known, atol=TOLERANCE, rtol=TOLERANCE)


def greedy(model: Any, row: Tensor, tokens: int) -> list[int]:
    known = oracle(model)
    logits = known.run(row)[-1]
    found = []
    for _ in range(tokens):
        found.append(int(logits.argmax()))
        logits = known.step(found[-1])
    return found


def test_generate(models: dict[str, Any]) -> None:
    model, rows = models["neox"], random_rows((40, 13, 27))
    ids, mask = left_padded(rows)
    given_cache = {cache_argument(model): sep_cache(model)}
    found = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, **given_cache)
    for row, tokens in zip(rows, found[:, ids.shape[1] :].tolist(), strict=True):
        assert tokens == greedy(model, row, 30)


def test_sampling_is_that_of_single_rows(models: dict[str, Any]) -> None:
    model, (row,) = models["llama"], random_rows((30,))
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(
            model.generate(row[None], max_new_tokens=25, do_sample=True, **{cache_argument(model): sep_cache(model)})
        )
    assert torch.equal(runs[0], runs[1])
    known = oracle(model).run(runs[0][0])
    found = call(model, sep_cache(model), runs[0])[0]
    torch.testing.assert_close(found, known, atol=TOLERANCE, rtol=TOLERANCE)


def test_beams_are_scored_as_the_oracle_scores_them(models: dict[str, Any]) -> None:
    model, rows = models["llama"], random_rows((30, 18))
    ids, mask = left_padded(rows)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, num_beams=3, do_sample=False, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True, **{cache_argument(model): sep_cache(model)},
    )  # fmt: skip
    for row, sequence, score in zip(rows, out.sequences, out.sequences_scores, strict=True):
        tokens = sequence[ids.shape[1] :]
        logits = oracle(model).run(torch.cat((row, tokens)))[len(row) - 1 : -1]
        known = logits.log_softmax(-1).gather(1, tokens[:, None]).sum()
        assert float(score) == pytest.approx(float(known), abs=1e-3)


def test_a_used_cache_goes_on_and_a_reset_one_begins_again(models: dict[str, Any]) -> None:
    model, (row,) = models["neox"], random_rows((80,))
    known = oracle(model).run(row)
    cache = sep_cache(model)
    for _ in range(2):
        found = torch.cat([call(model, cache, part[None])[0] for part in row.split(33)])
        torch.testing.assert_close(found, known, atol=TOLERANCE, rtol=TOLERANCE)
        cache.reset()
        assert cache.mean_length == 0 and cache.lengths == []


def test_crop_takes_tokens_back(models: dict[str, Any]) -> None:
    model, (row,) = models["llama"], random_rows((90,))
    known = oracle(model).run(row)
    wrong = random_rows((20,), 4)[0]
    cache = sep_cache(model)
    cache.activate_past_recording()
    for start, stop in ((0, 40), (40, 47), (47, 90)):
        call(model, cache, wrong[None])
        cache.crop(-len(wrong))
        found = call(model, cache, row[None, start:stop])[0]
        torch.testing.assert_close(found, known[start:stop], atol=TOLERANCE, rtol=TOLERANCE)
    lengths = Oracle(model, **SIZES)
    lengths.run(row)
    assert cache.mean_length == pytest.approx(sum(lengths.lengths) / 90)
    for _ in range(14):
        cache.crop(-1)
    # The count that stays, as transformers before 5.18 gives it.
    cache.crop(75)
    found = call(model, cache, row[None, 75:])[0]
    torch.testing.assert_close(found, known[75:], atol=TOLERANCE, rtol=TOLERANCE)
    call(model, cache, row[None].repeat(1, 30))
    assert len(cache._log) <= 64
    with pytest.raises(RuntimeError, match="cannot go back"):
        cache.crop(-2600)
    assert cache.columns_seen == 90 * 31
    cache.reset()
    call(model, cache, row[None])
    assert not cache._log
    unrecorded = sep_cache(model)
    call(model, unrecorded, row[None])
    with pytest.raises(RuntimeError, match=r"cannot go back by 40 tokens: it has dropped keys since"):
        unrecorded.crop(-40)
    with pytest.raises(ValueError, match=r"crop\(91\): the cache has seen 90 tokens only"):
        unrecorded.crop(91)


@pytest.mark.parametrize("helper", ["model", "prompt"])
def test_assisted_decoding(models: dict[str, Any], helper: str) -> None:
    model, (row,) = models["llama"], random_rows((50,))
    draft = tiny("llama")
    for parameter in draft.parameters():
        if parameter.dim() > 1:
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * parameter.std() / 10
            )
    # An end of text that never comes: transformers 5.5 looks for one in the prompt without asking if there is any.
    how = {"assistant_model": draft} if helper == "model" else {"prompt_lookup_num_tokens": 5, "eos_token_id": 64}
    cache = sep_cache(model)
    # Newer versions of transformers call it themselves.
    cache.activate_past_recording()
    found = model.generate(row[None], max_new_tokens=60, do_sample=False, **{cache_argument(model): cache}, **how)
    assert found[0, 50:].tolist() == greedy(model, row, 60)


def test_hybrid_keeps_all_keys_of_its_full_layers() -> None:
    model, rows = tiny("llama", layers=3), random_rows((70, 21))
    ids, mask = left_padded(rows)
    cache = sep_cache(model, full_layers=[0, 2], capacity=15)
    logits = in_chunks(model, cache, ids, mask, [30, 31])
    assert cache.positions == "training"
    layers = [layer.get_mask_sizes(0)[0] for layer in cache.layers]
    assert layers[0] == layers[2] == 70 and layers[1] <= 15
    for tokens, found in zip(rows, logits, strict=True):
        alone = call(model, sep_cache(model, full_layers=[0, 2], capacity=15), tokens[None])[0]
        torch.testing.assert_close(found[len(found) - len(tokens) :], alone, atol=TOLERANCE, rtol=TOLERANCE)
    # With room for all keys it is full attention; with little it is not.
    wide = call(model, sep_cache(model, full_layers=[0, 2], capacity=100), rows[0][None])
    torch.testing.assert_close(wide, model(input_ids=rows[0][None]).logits, atol=TOLERANCE, rtol=TOLERANCE)
    assert (wide[0] - logits[0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="positions='training'"):
        sep_cache(model, full_layers=[1], positions="cache")


def test_mean_length_is_the_papers_on_stationary_text(models: dict[str, Any]) -> None:
    model = models["neox"]
    (row,) = random_rows((4000,))
    row[torch.rand(4000, generator=torch.Generator().manual_seed(2)) < 0.2] = SEPARATORS[1]
    cache = sep_cache(model, window=16, capacity=60)
    call(model, cache, row[None])
    assert cache.mean_length == pytest.approx(cache.policies[0].mean_length, abs=1)


def test_a_copied_model_and_a_config_will_do(models: dict[str, Any]) -> None:
    model, (row,) = tiny("llama"), random_rows((50,))
    with pytest.raises(ValueError, match=r"no model with this LlamaConfig was attached: call .*attach\(model\)"):
        sep_cache(model.config)
    attach(model)
    known = oracle(models["llama"]).run(row)
    torch.testing.assert_close(call(model, sep_cache(model.config), row[None])[0], known, atol=1e-5, rtol=1e-5)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(call(copied, sep_cache(copied), row[None])[0], known, atol=1e-5, rtol=1e-5)
    assert len(copied.base_model._forward_pre_hooks) == 1


def test_other_calls_are_untouched(models: dict[str, Any]) -> None:
    fresh, (row,) = tiny("neox"), random_rows((40,))
    known = fresh(input_ids=row[None]).logits
    attach(fresh)
    assert torch.equal(fresh(input_ids=row[None]).logits, known)
    assert torch.equal(
        fresh.generate(row[None], max_new_tokens=9, do_sample=False),
        tiny("neox").generate(row[None], max_new_tokens=9, do_sample=False),
    )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"capacity": 14}, "initial=3 + separators=5 + window=6 is 14, and capacity=14 must be larger: at least 15"),
        ({"separators": 0}, "separators=0 keeps none: use StreamingCache"),
        ({"window": 0}, "window=0 must be a whole number of at least 1"),
        ({"initial": -1}, "initial=-1 must be a whole number of at least 0"),
        ({"capacity": 5000}, "capacity=5000 is above the model's context of 4096 positions"),
        ({"positions": "relative"}, "positions='relative' is unknown: choose one of cache, training, absolute"),
        ({"separator_ids": []}, "separators=[] names no token: use StreamingCache"),
        ({"separator_ids": [64]}, "separator id 64 is outside of the model's vocabulary of 64 entries"),
        ({"separator_ids": None}, "which tokens are separators is not known"),
        ({"full_layers": [2]}, "full_layers names layer 2; the model has layers 0 to 1"),
        ({"strict": True}, "strict=True, and the cache is not what the model was trained with: trained with full"),
    ],
)
def test_bad_sizes(models: dict[str, Any], sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        sep_cache(models["llama"], **sizes)
    assert message in str(raised.value)


def test_bad_calls(models: dict[str, Any]) -> None:
    model, (row,) = models["llama"], random_rows((30,))
    ids = row[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with pytest.raises(ValueError, match="padding after its first token: pad on the left"):
        call(model, sep_cache(model), ids, mask)
    with pytest.raises(ValueError, match="no input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 64), **{cache_argument(model): sep_cache(model)})
    other = tiny("llama")
    with pytest.raises(RuntimeError, match="was made for another model"):
        call(other, sep_cache(model), row[None])
    attach(other)
    with pytest.raises(ValueError, match="was made for another model"):
        call(other, sep_cache(model), row[None])
    with pytest.raises(ValueError, match="output_hidden_states=True tells of the last piece only"):
        model(input_ids=row[None], output_hidden_states=True, **{cache_argument(model): sep_cache(model)})
    cache = sep_cache(model)
    with pytest.raises(ValueError, match="pad on the left"):
        call(model, cache, ids, mask)
    call(model, cache, row[None])
    cache = sep_cache(model)
    call(model, cache, row[None])
    with pytest.raises(ValueError, match=r"holds 1 sequences and was given 2: call reset"):
        call(model, cache, ids)
    short = tiny("llama", max_position_embeddings=40)
    cache = sep_cache(short, positions="training")
    call(short, cache, row[None])
    with pytest.raises(ValueError, match="the text is 41 tokens long and the model's context 40"):
        call(short, cache, row[None, :11])
    call(short, sep_cache(short, positions="absolute"), torch.cat((row, row))[None])


def test_models_that_do_not_suit() -> None:
    with pytest.raises(ValueError, match="ALiBi"):
        sep_cache(tiny("falcon", alibi=True))
    with pytest.raises(ValueError, match="may hold 24 keys, more than the model's own sliding window of 20"):
        sep_cache(tiny("mistral", sliding_window=20))


def test_layers_without_rotary_embedding_are_found() -> None:
    """Positions in the cache would be wrong without a word."""
    settings = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "intermediate_size": 128, "pad_token_id": 0}  # fmt: skip
    for rotary, wrong in (([1, 1], False), ([1, 0], True)):
        config = transformers.SmolLM3Config(**settings, no_rope_layers=rotary)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        if wrong:
            with pytest.raises(ValueError, match="SmolLM3Model are not moved by rotation in every layer"):
                sep_cache(model)
        else:
            sep_cache(model)
        sep_cache(model, positions="training")


def test_tokenizers_of_transformers_tell_their_separators() -> None:
    """By the strings of their entries, also where no token ends a document; too large a vocabulary is refused."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, ".": 1, "b": 2, ",": 3}, unk_token="a"))
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    model = tiny("llama")
    assert make_pattern(model, tokenizer=wrapped).separators == [1, 3]
    assert make_pattern(model, tokenizer=wrapped, selection="comma").separators == [3]
    small = tiny("llama", vocab_size=3)
    with pytest.raises(ValueError, match="has 4 entries and the model's vocabulary 3: it is another model's tokenizer"):
        make_pattern(small, tokenizer=wrapped)


def test_llama_3_s_separators() -> None:
    """The ids that SepLLM's release lists, on a tokenizer that has these entries at the places of Llama 3's."""
    import tokenizers

    from sepllm_train.evaluation.options import PRESETS

    entries = {13: ".", 11: ",", 30: "?", 0: "!", 26: ";", 25: ":", 198: "\u010a", 220: "\u0120", 197: "\u0109"}
    words = {entries.get(number, f"w{number}"): number for number in range(230)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    made.decoder = tokenizers.decoders.ByteLevel()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    classes = PRESETS["llama3"].rpartition("=")[2].replace("+", ",")
    model = tiny("llama", vocab_size=300)
    model.config.bos_token_id = 280
    pattern = make_pattern(model, tokenizer=wrapped, selection=classes)
    assert pattern.separators == sorted([13, 11, 30, 0, 26, 25, 198, 220, 280])
    assert make_pattern(model, tokenizer=wrapped, selection="bos").separators == [280]
    model.config.bos_token_id = None
    with pytest.raises(ValueError, match="the class bos needs a bos_token_id in the model's config, which has None"):
        make_pattern(model, tokenizer=wrapped, selection=classes)


def test_gradient_checkpointing_is_refused() -> None:
    model, (row,) = tiny("llama"), random_rows((20,))
    cache = sep_cache(model)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing takes a model's cache away"):
        call(model, cache, row[None])


def trained(model: Any, **settings: Any) -> TokenPattern:
    """A pattern put into the model's config, as export does."""
    pattern = make_pattern(model, **{"window": 6, "initial": 3, "separators": SEPARATORS, **settings})
    setattr(model.config, CONFIG_KEY, pattern.to_dict())
    return pattern


def test_the_pattern_of_training() -> None:
    model = tiny("llama")
    trained(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        same = SepCache(model, **SIZES, strict=True)
        PatternCache(model, strict=True)
    assert same.differences == () and same.pattern.separators == SEPARATORS
    with pytest.warns(UserWarning, match="training-free use: a window of 7 where training had a window of 6"):
        other = SepCache(model, **{**SIZES, "window": 7, "initial": 4})
    assert len(other.differences) == 2
    with pytest.raises(ValueError, match="strict=True.*0 separator tokens where training had 4"):
        StreamingCache(model, 3, 6, strict=True)


def test_full_layers_of_training_stay_full() -> None:
    model = tiny("llama", layers=3)
    pattern = trained(model)
    content = {**pattern.to_dict(), "windows": [None, 6, None]}
    setattr(model.config, CONFIG_KEY, content)
    cache = SepCache(model, **SIZES)
    assert cache.positions == "training" and [p.window >= FOREVER for p in cache.policies] == [True, False]
    assert len(cache.pattern.tier_of_token) == VOCABULARY


def test_the_documented_call_is_not_deprecated(models: dict[str, Any], repository: Path) -> None:
    """Of the version of transformers that is there; README and docs show the same."""
    model, (row,) = models["llama"], random_rows((30,))
    cache = SepCache(model, initial=2, separators=2, window=6, capacity=16, separator_ids=SEPARATORS)
    argument = cache_argument(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model.generate(row[None], max_new_tokens=3, do_sample=False, **{argument: cache})
    if argument == "cache":
        for name in ("README.md", "docs/inference.md", "docs/api.md"):
            calls = re.findall(r"generate\([^)]*?(\w+)=(?:SepCache|cache\b|\.\.\.)", (repository / name).read_text())
            assert set(calls) <= {"cache"}, name

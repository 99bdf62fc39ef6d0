"""A pattern on a transformers model, against a mask that is written from the definition."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from sep_attention import FOREVER

from sepllm_train.base.errors import UserError
from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.hf import PatternCache, apply_pattern, cache_argument, load_model, make_pattern, remove_pattern
from tests.hf.tiny_models import FAMILIES, SEPARATORS, VOCABULARY, left_padded, random_rows, tiny

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
WITHOUT_KERNEL = ("falcon", "gemma2")

pytestmark = [
    pytest.mark.filterwarnings("ignore:training-free use"),
    pytest.mark.filterwarnings("error:.*past_key_values.*:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def paper(model: Any, **settings: Any) -> TokenPattern:
    return make_pattern(model, **{"window": 6, "initial": 3, "separators": SEPARATORS, **settings})


def tiers(model: Any) -> TokenPattern:
    """Two tiers of which one ends, and documents."""
    tier = torch.zeros(VOCABULARY, dtype=torch.uint8)
    tier[SEPARATORS[:2]], tier[SEPARATORS[2:]] = 1, 2
    return TokenPattern((6,) * model.config.num_hidden_layers, 3, (FOREVER, 15), tier, end_of_document=5)


def seen(pattern: TokenPattern, row: Tensor, window: int) -> Tensor:
    """bool [T, T], key by key."""
    ids = row.tolist()
    starts = [0]
    for before in ids[:-1]:
        starts.append(
            len(starts) if pattern.end_of_document is not None and before == pattern.end_of_document else starts[-1]
        )
    mask = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for query in range(len(ids)):
        for key in range(starts[query], query + 1):
            horizon = (0, *pattern.horizons)[int(pattern.tier_of_token[ids[key]])]
            if pattern.interval is not None:
                horizon = FOREVER if key % pattern.interval == 0 else 0
            if key - starts[key] < pattern.initial:
                horizon = FOREVER
            mask[query, key] = query - key < max(window, horizon)
    return mask


def expected(family: str, pattern: TokenPattern, row: Tensor) -> Tensor:
    """Logits [T, V] of the model with a mask of its own in every layer."""
    model = tiny(family, layers=len(pattern.windows))
    layers = next(child for child in model.base_model.children() if isinstance(child, torch.nn.ModuleList))
    for layer, window in zip(layers, pattern.windows, strict=True):
        mask = torch.where(seen(pattern, row, window), 0.0, torch.finfo(torch.float32).min)[None, None]
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
        )
    return model(input_ids=row[None], attention_mask=mask).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["kernel", "mask"])
def test_families(family: str, implementation: str) -> None:
    model, rows = tiny(family), random_rows((60, 41))
    if family in WITHOUT_KERNEL and implementation == "kernel":
        with pytest.raises(ValueError, match="implementation='kernel' does not suit"):
            apply_pattern(model, paper(model), implementation="kernel")
        return
    full = model(input_ids=rows[0][None]).logits[0]
    apply_pattern(model, paper(model), implementation=implementation)
    ids, mask = left_padded(rows)
    found = model(input_ids=ids, attention_mask=mask).logits
    for row, logits in zip(rows, found, strict=True):
        torch.testing.assert_close(logits[60 - len(row) :], expected(family, paper(model), row), **TOLERANCE)
    assert (found[0] - full).abs().max() > 1e-3
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    again = model(input_ids=tokens[:1]).logits[0].argmax(-1)
    assert torch.equal(again[59:-1], tokens[0, 60:])


@pytest.mark.parametrize("implementation", ["kernel", "mask"])
@pytest.mark.parametrize("kind", ["hybrid", "fixed", "tiers", "long"])
def test_patterns(implementation: str, kind: str) -> None:
    model = tiny("llama", layers=3)
    pattern = {
        "hybrid": replace(paper(model), windows=(FOREVER, 6, 9)),
        "fixed": replace(paper(model), interval=7),
        "tiers": tiers(model),
        "long": paper(model),
    }[kind]
    # Beyond 256 tokens the kernel works in blocks.
    (row,) = random_rows((300 if kind == "long" else 80,))
    apply_pattern(model, pattern, implementation=implementation)
    known = expected("llama", pattern, row)
    torch.testing.assert_close(model(input_ids=row[None]).logits[0], known, **TOLERANCE)
    cache = PatternCache(model, pattern, block=50)
    found = model(input_ids=row[None], **{cache_argument(model): cache}).logits[0]
    torch.testing.assert_close(found, known, **TOLERANCE)


def test_the_cache_of_a_pattern_forgets_what_is_not_seen_again() -> None:
    model, (row,) = tiny("llama"), random_rows((2000,))
    row[row % 4 == 3] = 1
    row[::50] = SEPARATORS[0]
    pattern = paper(model)
    cache = PatternCache(model, pattern)
    found = model(input_ids=row[None], **{cache_argument(model): cache}).logits
    apply_pattern(model, pattern)
    torch.testing.assert_close(found, model(input_ids=row[None]).logits, **TOLERANCE)
    assert cache.lengths[0] < 2000 / 50 + 3 + 6 + 256 + 1


def test_horizons_end_in_the_cache_too() -> None:
    model, (row,) = tiny("llama"), random_rows((700,))
    pattern = replace(tiers(model), end_of_document=None)
    found = model(input_ids=row[None], **{cache_argument(model): PatternCache(model, pattern)}).logits[0]
    apply_pattern(model, pattern, implementation="mask")
    torch.testing.assert_close(found, model(input_ids=row[None]).logits[0], **TOLERANCE)


@pytest.mark.parametrize("implementation", ["kernel", "mask"])
def test_beams(implementation: str) -> None:
    """transformers' cache is put in another order: the ids that the pattern remembers must follow."""
    model, rows = tiny("neox"), random_rows((30, 22))
    ids, mask = left_padded(rows)
    pattern = paper(model)
    how = {"attention_mask": mask, "max_new_tokens": 25, "num_beams": 3, "do_sample": False}
    known = model.generate(ids, **how, **{cache_argument(model): PatternCache(model, pattern)})
    apply_pattern(model, pattern, implementation=implementation)
    assert torch.equal(model.generate(ids, **how), known)


def test_gradients_are_those_of_the_mask() -> None:
    rows = random_rows((40, 40))
    found = []
    for implementation in ("kernel", "mask"):
        model = tiny("llama")
        apply_pattern(model, paper(model), implementation=implementation)
        with torch.enable_grad():
            model(input_ids=torch.stack(rows), labels=torch.stack(rows), use_cache=False).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_put_on_and_taken_off(own: str) -> None:
    model, (row,) = tiny("llama"), random_rows((50,))
    model.set_attn_implementation(own)
    full = model(input_ids=row[None]).logits
    for implementation in ("kernel", "mask", "auto", "auto"):
        apply_pattern(model, paper(model), implementation=implementation)
        assert not torch.allclose(model(input_ids=row[None]).logits, full, **TOLERANCE)
    assert torch.equal(remove_pattern(model)(input_ids=row[None]).logits, full)
    assert model.config._attn_implementation == own


def test_documents_in_a_ragged_batch_and_token_by_token() -> None:
    """Rows whose documents end at different places forget their keys each at its own."""
    model, rows = tiny("llama"), random_rows((70, 44))
    for row, at in zip(rows, (20, 31), strict=True):
        row[row == 5] = 6
        row[[at, at + 9]] = 5
    ids, mask = left_padded(rows)
    cache = PatternCache(model, tiers(model))
    name = cache_argument(model)
    calls = [model(input_ids=ids[:, :50], attention_mask=mask[:, :50], **{name: cache}).logits]
    calls += [
        model(input_ids=ids[:, n : n + 1], attention_mask=mask[:, : n + 1], **{name: cache}).logits
        for n in range(50, 70)
    ]
    for row, logits in zip(rows, torch.cat(calls, 1), strict=True):
        torch.testing.assert_close(logits[70 - len(row) :], expected("llama", tiers(model), row), **TOLERANCE)
    assert cache.mean_length < 35


@pytest.mark.parametrize("implementation", ["kernel", "mask"])
def test_the_pattern_takes_the_place_of_sliding_windows(implementation: str) -> None:
    model, (row,) = tiny("mistral", sliding_window=16), random_rows((40,))
    apply_pattern(model, paper(model), implementation=implementation)
    torch.testing.assert_close(
        model(input_ids=row[None]).logits[0], expected("mistral", paper(model), row), **TOLERANCE
    )
    tokens = model.generate(row[None], max_new_tokens=12, do_sample=False)
    assert torch.equal(model(input_ids=tokens).logits[0].argmax(-1)[39:-1], tokens[0, 40:])


def test_autocast() -> None:
    model, (row,) = tiny("llama"), random_rows((40,))
    known = expected("llama", paper(model), row)
    apply_pattern(model, paper(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(input_ids=row[None]).logits[0].float()
    assert (found - known).abs().max() < 0.1 * known.abs().max()


def test_attaching_fails_whole() -> None:
    """A model whose layers are not found is refused again and again."""
    model = tiny("llama")
    model.base_model.layers = torch.nn.ModuleList([*model.base_model.layers, torch.nn.Identity()])
    for _ in range(2):
        with pytest.raises(ValueError, match="has no list of 2 layers"):
            apply_pattern(model, paper(model), implementation="mask")
    assert not model.base_model._forward_pre_hooks


def test_a_failed_forward_leaves_nothing() -> None:
    model, (row,) = tiny("llama", layers=3), random_rows((40,))
    known = model(input_ids=row[None]).logits
    cache = PatternCache(model, replace(paper(model), windows=(FOREVER, 6, 9)))
    failing = model.base_model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=row[None], **{cache_argument(model): cache})
    failing.remove()
    assert torch.equal(model(input_ids=row[None]).logits, known)
    with pytest.raises(RuntimeError, match=r"failed half-way: call reset\(\)"):
        model(input_ids=row[None], **{cache_argument(model): cache})


def test_weights_that_are_not_there(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    tiny("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of its model.*layers.1.mlp.up_proj.weight"):
        load_model(str(tmp_path))


def test_names_that_are_no_folder_of_a_model_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no hub is asked."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "adapter", "empty", "gone"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: run\n")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/model"}')
    for path, sentence in {
        "run": "run is a run, not a model of transformers: `sepllm export run FOLDER` writes one",
        "adapter": "adapter is an adapter without its model",
        "empty": "empty has no config.json",
        "run/config.yaml": "run/config.yaml is a file",
        "runs/nowhere": "runs/nowhere is not a folder: give that of an exported model, or download",
        "gpt2": "gpt2 is not a folder",
        "": "has no config.json",
        "x" * 5000: "is not a folder",
    }.items():
        with pytest.raises(UserError, match=re.escape(sentence)):
            load_model(path)
        with pytest.raises(UserError, match=re.escape(sentence)):
            load_model(Path(path))
    (tmp_path / "gone" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(OSError, match="gone"):
        load_model("gone")


def test_a_folder_with_a_pattern(tmp_path: Any) -> None:
    model, (row,) = tiny("llama"), random_rows((50,))
    model.config.sepllm_attention = paper(model).to_dict()
    model.save_pretrained(tmp_path)
    found = load_model(str(tmp_path))(input_ids=row[None]).logits[0]
    torch.testing.assert_close(found, expected("llama", paper(model), row), **TOLERANCE)
    dense = load_model(str(tmp_path), dense=True)(input_ids=row[None]).logits
    torch.testing.assert_close(dense, model(input_ids=row[None]).logits, **TOLERANCE)


# Whose forwards take one mask for all layers, or a dict of one for each kind of layer.
MASKS = ("llama", "neox", "qwen2", "qwen3", "gemma2", "gemma3", "olmo3", "gpt_oss", "ministral", "cohere2")


@pytest.mark.parametrize("family", MASKS)
def test_static_caches_and_their_masks_are_refused(family: str) -> None:
    """generate hands some models a dict of masks with its static caches; with a cache that grows it works."""
    model, (row,) = tiny(family), random_rows((20,))
    pattern = paper(model)
    apply_pattern(model, pattern)
    made = model.generate(row[None], max_new_tokens=5, do_sample=False)
    again = model(input_ids=made, use_cache=False).logits[0, 19:-1].argmax(-1)
    assert torch.equal(made[0, 20:], again)
    sentence = "the pattern does not work with StaticCache: use transformers' DynamicCache"
    static = {cache_argument(model): transformers.StaticCache(config=model.config, max_cache_len=40)}
    for options in ({"cache_implementation": "static"}, static):
        with pytest.raises(ValueError, match=sentence):
            model.generate(row[None], max_new_tokens=3, do_sample=False, **options)
    masks = {"full_attention": torch.ones(1, 1, 20, 20), "sliding_attention": torch.ones(1, 1, 20, 20)}
    for cache in ({}, {cache_argument(model): PatternCache(model, pattern)}):
        with pytest.raises(ValueError, match="attention_mask is a dict, one mask for each kind of layer"):
            model.base_model(input_ids=row[None], attention_mask=masks, **cache)


def test_nothing_attends_fully_in_silence() -> None:
    model = tiny("llama")
    model.set_attn_implementation("sepllm")
    with pytest.raises(ValueError, match=r"was not given one: load it with sepllm_train.hf.load_model"):
        model(input_ids=torch.ones(1, 5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pattern: None, "was trained with full attention: give pattern="),
        (lambda pattern: replace(pattern, windows=(6,)), "the pattern is for 1 layers and the model has 2"),
        (
            lambda pattern: replace(pattern, tier_of_token=torch.zeros(65, dtype=torch.uint8)),
            "the pattern knows 65 tokens and the model's vocabulary has 64 entries",
        ),
    ],
)
def test_patterns_that_do_not_suit(change: Any, message: str) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=message):
        apply_pattern(model, change(paper(model)))


def test_bad_calls() -> None:
    model, (row,) = tiny("llama"), random_rows((20,))
    used = transformers.DynamicCache(config=model.config)
    model(input_ids=row[None], **{cache_argument(model): used})
    with pytest.raises(ValueError, match="strict=True"):
        apply_pattern(model, paper(model), strict=True)
    with pytest.raises(ValueError, match="implementation='fast' is unknown"):
        apply_pattern(model, paper(model), implementation="fast")
    apply_pattern(model, paper(model))
    with pytest.raises(ValueError, match="filled without the pattern: begin with an empty one"):
        model(input_ids=row[None], **{cache_argument(model): used})
    static = transformers.StaticCache(config=model.config, max_cache_len=40)
    with pytest.raises(ValueError, match="does not work with StaticCache"):
        model(input_ids=row[None], **{cache_argument(model): static})
    mask = torch.ones(1, 20, dtype=torch.int64)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="pad on the left"):
        model(input_ids=row[None], attention_mask=mask, use_cache=True)

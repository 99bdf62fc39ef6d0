"""Classes of transformers with patterns and caches: the table in docs/architectures.md, and what is special in some."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from sep_attention import FOREVER

from sepllm_train.hf import Decoder, PatternCache, SepCache, apply_pattern, cache_argument, make_pattern
from tests.hf import architectures as walk
from tests.hf.tiny_models import SEPARATORS, left_padded, random_rows

ALL = dict.fromkeys(walk.COLUMNS, "yes")
NO_KERNEL = "no: implementation='kernel' does not suit the model: it does not let its attention be chosen. Use 'mask'."
NO_ROTATION = "no: the model has no rotary position embedding that can be moved: use positions='training'."
ALIBI = "no: the model has ALiBi positions, which are distances in the text: use positions='training'."
# Few of each kind; the slow test has all.
FAMILIES: dict[str, dict[str, str]] = {
    "gpt_neox": ALL,
    "llama": ALL,
    "opt": {
        **ALL,
        "cache": "no: the model has no rotary position embedding that can be moved: use positions='training'.",
    },
    "bloom": {
        **ALL,
        "kernel": NO_KERNEL,
        "cache": "no: the model has ALiBi positions, which are distances in the text",
    },
    "mpt": {**ALL, "kernel": NO_KERNEL, "cache": ALIBI},
    "gptj": ALL,
    "falcon": {**ALL, "kernel": NO_KERNEL},
    "gemma2": {**ALL, "kernel": "no: implementation='kernel' does not suit the model: it caps the logits"},
}

pytestmark = pytest.mark.filterwarnings("ignore:training-free use")


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families(model_type: str) -> None:
    found = walk.find([model_type])[model_type]
    for column, known in FAMILIES[model_type].items():
        assert found[column].startswith(known), (column, found[column])


@pytest.mark.slow
def test_all_classes_are_right_or_refused_as_the_table_says() -> None:
    found = walk.find(walk.model_types())
    for name, cells in found.items():
        wrong = {column: text for column, text in cells.items() if not text.startswith(("yes", "no: "))}
        assert not wrong or "not tried" in cells, (name, wrong)
    _, version, table = walk.committed()
    if version == transformers.__version__:
        assert walk.render(found) == table, "run python -m tests.hf.architectures --write"


def paper(model: Any, **settings: Any) -> Any:
    return make_pattern(model, **{"window": 6, "initial": 3, "separators": SEPARATORS, **settings})


@pytest.mark.parametrize("model_type", ["opt", "bloom", "mpt", "gpt2"])
def test_generation_of_a_batch_is_that_of_single_rows(model_type: str) -> None:
    """With layers that attend differently, in transformers' own cache and, but for MPT, in that of the pattern."""
    model, rows = walk.tiny(model_type), random_rows((30, 19))
    model.generation_config.eos_token_id = None
    pattern = replace(paper(model), windows=(FOREVER, 6))
    ids, mask = left_padded(rows)
    how = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0}
    cached = [
        model.generate(row[None], **how, **{cache_argument(model): PatternCache(model, pattern)})[0, len(row) :]
        for row in rows
    ]
    apply_pattern(model, pattern)
    found = model.generate(ids, attention_mask=mask, **how)[:, 30:]
    for row, tokens, alone in zip(rows, found, cached, strict=True):
        again = model(input_ids=torch.cat((row, tokens))[None]).logits[0].argmax(-1)
        assert torch.equal(tokens, again[len(row) - 1 : -1]) and torch.equal(tokens, alone)


def test_alibi_of_falcon() -> None:
    """Whose biases are rounded to bfloat16 and depend on the position itself."""
    settings = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.FalconConfig(**settings, alibi=True)).eval()
    rows = random_rows((40, 27))
    ids, mask = left_padded(rows)
    full = model(input_ids=rows[0][None]).logits[0]
    pattern = paper(model)
    found = model(input_ids=ids, attention_mask=mask, **{cache_argument(model): PatternCache(model, pattern)}).logits
    apply_pattern(model, pattern)
    for row in range(2):
        known = model(input_ids=rows[row][None]).logits[0]
        torch.testing.assert_close(found[row, 40 - len(rows[row]) :], known, atol=1e-5, rtol=1e-5)
    apply_pattern(model, paper(model, window=40))
    torch.testing.assert_close(model(input_ids=rows[0][None]).logits[0], full, atol=1e-5, rtol=1e-5)


def test_alibi_where_it_cannot_be() -> None:
    model, rows = walk.tiny("mpt"), random_rows((40, 33))
    cache = SepCache(model, **walk.SIZES, separator_ids=SEPARATORS, positions="training")
    with pytest.raises(ValueError, match="adds the same ALiBi biases to all rows of a batch.*one text at a time"):
        ids, mask = left_padded(rows)
        model(input_ids=ids, attention_mask=mask, **{cache_argument(model): cache})
    model = walk.tiny("bloom")
    cache = SepCache(model, **walk.SIZES, separator_ids=SEPARATORS, positions="training")
    model(input_ids=rows[0][None], **{cache_argument(model): cache})
    with pytest.raises(ValueError, match="a Decoder knows no ALiBi biases"):
        Decoder(model, cache)


def test_windows_of_the_models_own_are_said_once() -> None:
    model = walk.tiny("mistral", walk.NARROW)
    with pytest.warns(UserWarning, match="takes the place of the windows of 14 tokens that layers of Mistral") as said:
        apply_pattern(model, paper(model))
    assert len(said) == 1
    model = walk.tiny("gpt_neo", walk.NARROW)
    with pytest.raises(ValueError, match="GPTNeoModel has layers that see 14 keys whatever mask they are given"):
        apply_pattern(model, paper(model))


def test_a_model_that_takes_no_mask_is_refused() -> None:
    """Whatever it is: here a Llama one layer of which leaves its mask out, and one that sees the token before."""
    model = walk.tiny("llama")
    layer = model.base_model.layers[1]
    leaving = layer.self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
    )
    sentence = (
        "LlamaModel cannot attend by a pattern: a token that the mask hides still changes the output of later ones"
    )
    with pytest.raises(ValueError, match=sentence):
        apply_pattern(model, paper(model), implementation="mask")
    leaving.remove()
    shifting = layer.register_forward_hook(lambda _, args, out: out + 0.1 * out.roll(1, 1))
    for implementation in ("mask", "kernel", "auto"):
        with pytest.raises(ValueError, match="still changes the output of later ones|is not that without one"):
            apply_pattern(model, paper(model), implementation=implementation)
    with pytest.raises(ValueError, match="LlamaModel does not suit this cache"):
        PatternCache(model, paper(model))
    shifting.remove()
    PatternCache(model, paper(model))

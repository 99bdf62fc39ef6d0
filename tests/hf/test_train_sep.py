"""attn_implementation="sep" on classes of transformers: made by it, trained through it, as this framework trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from sepllm_train.distributed.launch import alone  # noqa: E402
from sepllm_train.hf import apply_pattern, load_model, make_pattern, remove_pattern, separator_ids  # noqa: E402
from sepllm_train.runs.open import open_run  # noqa: E402
from tests.hf.tiny_models import SEPARATORS, VOCABULARY, left_padded, random_rows, tiny  # noqa: E402

AUTO = transformers.AutoModelForCausalLM
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def configured(family: str, **pattern: Any) -> Any:
    """Configuration of a tiny model with a pattern."""
    config = copy.deepcopy(tiny(family).config)
    pattern = {"window": 6, "initial": 3, "separators": SEPARATORS, **pattern}
    config.sepllm_attention = make_pattern(config, **pattern).to_dict()
    return config


def made(family: str, attention: str = "sep", **pattern: Any) -> Any:
    """A tiny model that attends by the pattern of its configuration."""
    torch.manual_seed(0)
    model = AUTO.from_config(configured(family, **pattern), attn_implementation=attention)
    model.load_state_dict(tiny(family).state_dict())
    return model


def masked(family: str, **pattern: Any) -> Any:
    """The same by masks."""
    model = tiny(family)
    model.config.sepllm_attention = configured(family, **pattern).sepllm_attention
    return apply_pattern(model, implementation="mask")


@pytest.mark.parametrize("attention", ["sep", "sepllm"])
@pytest.mark.parametrize("family", ["neox", "llama", "qwen3"])
def test_made_of_a_configuration_it_attends_by_its_pattern(family: str, attention: str) -> None:
    (row,) = random_rows((60,))
    with torch.no_grad():
        found = made(family, attention)(input_ids=row[None]).logits
        torch.testing.assert_close(found, masked(family)(input_ids=row[None]).logits, **TOLERANCE)
        assert (found - tiny(family)(input_ids=row[None]).logits).abs().max() > 1e-3


def test_loaded_from_a_folder_and_saved_again(tmp_path: Path) -> None:
    (row,) = random_rows((60,))
    tiny("llama").save_pretrained(tmp_path / "dense")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "dense")
    config.sepllm_attention = configured("llama").sepllm_attention
    model = AUTO.from_pretrained(tmp_path / "dense", config=config, attn_implementation="sep")
    with torch.no_grad():
        known = masked("llama")(input_ids=row[None]).logits
        torch.testing.assert_close(model(input_ids=row[None]).logits, known, **TOLERANCE)
        model.save_pretrained(tmp_path / "sep")
        for again in (AUTO.from_pretrained(tmp_path / "sep"), load_model(tmp_path / "sep"), copy.deepcopy(model)):
            torch.testing.assert_close(again(input_ids=row[None]).logits, known, **TOLERANCE)
        generated = model.generate(row[None], max_new_tokens=10, do_sample=False)
        again = model(input_ids=generated).logits[0, 59:-1].argmax(-1)
    assert torch.equal(generated[0, 60:], again)


def test_no_pattern_is_an_error_and_another_attention_too() -> None:
    (row,) = random_rows((20,))
    model = AUTO.from_config(tiny("llama").config, attn_implementation="sep")
    with pytest.raises(ValueError, match=r"was not given one: load it with .*call sepllm_train.hf.apply_pattern"):
        model(input_ids=row[None])
    apply_pattern(model, make_pattern(model, window=6, initial=3, separators=SEPARATORS))(input_ids=row[None])
    bare = transformers.AutoModel.from_config(configured("llama"), attn_implementation="sep")
    with pytest.raises(ValueError, match="was not given one"):
        bare(input_ids=row[None])
    apply_pattern(bare)(input_ids=row[None])
    with pytest.raises(ValueError, match="implementation='kernel' does not suit Gemma2Model: it caps the logits"):
        AUTO.from_config(configured("gemma2"), attn_implementation="sep")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"was set to sdpa: call remove_pattern\(model\)"):
        model(input_ids=row[None])
    assert remove_pattern(model).config._attn_implementation == "sdpa"
    model(input_ids=row[None])


def test_a_pattern_that_was_put_on_stays() -> None:
    """Where the model with it becomes part of another, as of an adapter."""
    model = made("llama")
    apply_pattern(model, make_pattern(model, window=9, initial=1))
    torch.nn.Sequential(model)
    assert model.base_model.sepllm_pattern.pattern.windows == (9, 9)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [60, 300])
def test_padding_on_either_side_in_training(side: str, length: int) -> None:
    rows = random_rows((length, length - 19))
    ids, mask = left_padded(rows)
    if side == "right":
        ids[1], mask[1] = ids[1].roll(-19), mask[1].roll(-19)
    model = made("neox").train()
    labels = ids.masked_fill(mask == 0, -100)
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    alone = made("neox").train()
    losses = [alone(input_ids=row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
    # Padding before the first token has a label less than tokens: the first token is predicted from padding.
    count = sum(len(row) - 1 for row in rows)
    if side == "right":
        (sum(losses) / count).backward()
        for (name, found), wanted in zip(model.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(found.grad, wanted.grad, atol=1e-5, rtol=1e-4, msg=name)
    else:
        found = model(input_ids=ids, attention_mask=mask).logits[1, 19:]
        torch.testing.assert_close(found, alone(input_ids=rows[1][None]).logits[0], **TOLERANCE)


def test_padding_between_tokens_is_refused() -> None:
    model, (row,) = made("llama").train(), random_rows((20,))
    mask = torch.ones(1, 20, dtype=torch.int64)
    mask[0, 4] = 0
    with pytest.raises(ValueError, match="padding between its tokens: pad on one side"):
        model(input_ids=row[None], attention_mask=mask)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensor-hooks", "reentrant"])
def test_gradient_checkpointing(reentrant: bool) -> None:
    ids = torch.stack(random_rows((300, 300)))
    gradients = []
    for checkpointing in (False, True):
        model = made("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-5)


def our_losses(folder: Path, batches: list[Tensor]) -> list[float]:
    """Training losses of this framework's model, [B, S] at a time."""
    run, losses = open_run(folder), []
    with alone():
        model = run.load_model().train()
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
        for ids in batches:
            start = torch.zeros_like(ids)
            plan = run.pattern.plan(torch.from_numpy(run.classes)[ids], start)
            loss = model(ids, plan, labels=ids.roll(-1, 1))[:, :-1].mean()
            losses.append(step(optimizer, loss))
    return losses


def their_losses(folder: Path, pattern: dict[str, Any], batches: list[Tensor]) -> list[float]:
    """Those of the model of transformers."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.sepllm_attention = pattern
    model = AUTO.from_pretrained(folder, config=config, attn_implementation="sep").train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    return [step(optimizer, model(input_ids=ids, labels=ids).loss) for ids in batches]


def step(optimizer: Any, loss: Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss)


@pytest.mark.parametrize("name", ["neox", "llama, grouped, tied"])
def test_the_losses_are_those_of_our_own_model(models: Callable[[str], Path], name: str) -> None:
    """From the same weights, on the same batches, with the same optimizer: fp32, 20 steps."""
    folder = models(name)
    run = open_run(folder / "ours")
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(1, 4000, (2, 96), generator=generator) for _ in range(20)]
    # One token in six separates, so that what is behind the window matters.
    separators = torch.tensor(run.token_pattern.separators)
    for ids in batches:
        chosen = torch.randint(len(separators), ids.shape, generator=generator)
        ids[:, ::6] = separators[chosen][:, ::6]
    ours = our_losses(folder / "ours", batches)
    theirs = their_losses(folder / "theirs", run.token_pattern.to_dict(), batches)
    dense = {**run.token_pattern.to_dict(), "windows": [None] * run.config.model.layers}
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-5
    assert ours[-1] < ours[0] - 0.05
    assert max(abs(a - b) for a, b in zip(ours, their_losses(folder / "theirs", dense, batches), strict=True)) > 1e-3


def test_separators_of_a_tokenizer_in_one_call(tokenizer: Path, models: Callable[[str], Path]) -> None:
    known = separator_ids(tokenizer)
    assert known == separator_ids(str(tokenizer)) == separator_ids(models("neox") / "theirs")
    assert set(known) < set(separator_ids(tokenizer, "all"))
    assert set(separator_ids(tokenizer, "period")) < set(known)
    loaded = transformers.AutoTokenizer.from_pretrained(models("neox") / "ours")
    assert separator_ids(loaded) == known
    with pytest.raises(ValueError, match="is another model's tokenizer"):
        separator_ids(tokenizer, vocabulary=VOCABULARY)
    with pytest.raises(ValueError, match="Cannot read the tokenizer"):
        separator_ids(tokenizer.with_name("gone"))


@pytest.mark.parametrize("attention", ["sep", "mask"])
def test_several_documents_in_a_row_are_refused(attention: str) -> None:
    model = made("llama") if attention == "sep" else masked("llama")
    (row,) = random_rows((20,))
    positions = torch.arange(10).repeat(2)[None]
    with pytest.raises(ValueError, match="several documents in a row"):
        model(input_ids=row[None], position_ids=positions, use_cache=False)
    model(input_ids=row[None], position_ids=torch.arange(5, 25)[None], use_cache=False)


@torch.no_grad()
def test_padding_behind_the_tokens_needs_no_cache_in_evaluation_either() -> None:
    model = made("llama")
    (row,) = random_rows((20,))
    mask = torch.ones(1, 20, dtype=torch.int64)
    mask[:, 15:] = 0
    found = model(input_ids=row[None], attention_mask=mask).logits[:, :15]
    torch.testing.assert_close(found, model(input_ids=row[None, :15]).logits, **TOLERANCE)


@torch.no_grad()
def test_mask_of_the_new_tokens_alone_is_refused() -> None:
    model = made("llama")
    (row,) = random_rows((20,))
    cache = model(input_ids=row[None, :15], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="attention_mask has 5 columns"):
        model(input_ids=row[None, 15:], attention_mask=torch.ones(1, 5, dtype=torch.int64), past_key_values=cache)


@torch.no_grad()
def test_added_tokens_are_no_separators(tmp_path: Path) -> None:
    model = made("llama")
    model.resize_token_embeddings(VOCABULARY + 8)
    model.save_pretrained(tmp_path)
    (row,) = random_rows((20,))
    row[4] = VOCABULARY + 3
    plan = load_model(tmp_path).model.sepllm_pattern.pattern.plan(row[None])
    assert plan.tier[0, 4] == 0
    assert load_model(tmp_path)(input_ids=row[None]).logits.isfinite().all()


@torch.no_grad()
def test_pattern_on_a_model_of_peft() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    (row,) = random_rows((60,))
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules="all-linear", r=2)).eval()
    full = model(input_ids=row[None]).logits
    apply_pattern(model, make_pattern(tiny("llama"), window=6, initial=3, separators=SEPARATORS))
    torch.testing.assert_close(
        model(input_ids=row[None]).logits, masked("llama")(input_ids=row[None]).logits, **TOLERANCE
    )
    remove_pattern(model)
    torch.testing.assert_close(model(input_ids=row[None]).logits, full, **TOLERANCE)


def test_frozen_parts_stay_as_they_are() -> None:
    model = tiny("llama").train()
    model.model.layers[0].eval()
    apply_pattern(model, make_pattern(model, window=6, initial=3, separators=SEPARATORS))
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training

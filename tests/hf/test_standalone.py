"""Exported models without this package: remote code that attends by the pattern, and copies of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is an optional package: extra hf")

import transformers
from sep_attention import FOREVER

from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.hf import PatternCache, apply_pattern, cache_argument, load_model
from sepllm_train.hf.guard import MODULE
from tests.hf import standalone_worker
from tests.hf.bare import packages_without_ours, run_bare
from tests.hf.test_pattern import expected, paper, tiers
from tests.hf.tiny_models import VOCABULARY, left_padded, random_rows, tiny

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
LENGTHS = (90, 61, 40)
PIECES = [50, 1, 1, 30, *[1] * 8]


def patterns(model: Any) -> dict[str, TokenPattern]:
    """Everything that config.json can hold."""
    return {
        "paper": paper(model),
        "hybrid": replace(paper(model), windows=(FOREVER, 6, 9)),
        "fixed": replace(paper(model), interval=7, initial=1),
        "tiers": tiers(model),
        "documents": replace(paper(model), windows=(FOREVER,) * 3, end_of_document=5),
        "streaming": TokenPattern((4, 8, 16), 2, (FOREVER,), torch.zeros(VOCABULARY, dtype=torch.uint8)),
        "no_initial": replace(tiers(model), initial=0, horizons=(30, 15)),
    }


CASES = [("neox", "paper"), ("neox", "tiers"), ("qwen3", "hybrid"), *(("llama", kind) for kind in patterns(tiny("llama", 3)))]  # fmt: skip  # noqa: E501
LONG = 380
# Greedy tokens that do not run into a loop.
VARIED = {"do_sample": False, "no_repeat_ngram_size": 3}
# Beyond what a cache keeps without looking.
EVICTED = (420, 300, 150)


def write(folder: Path, family: str, kind: str) -> Path:
    """A model with its pattern, as an export writes it."""
    model = tiny(family, layers=3)
    model.config.sepllm_attention = patterns(model)[kind].to_dict()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packages_without_ours(tmp_path_factory.mktemp("bare") / "packages")


@pytest.fixture(scope="module")
def bare(packages: Path) -> Callable[[Path, dict[str, Any]], dict[str, Any]]:
    """Runs tasks of standalone_worker.py where this project is not installed."""

    def run(folder: Path, tasks: dict[str, Any]) -> dict[str, Any]:
        torch.save(tasks, folder / "tasks.pt")
        run_bare(packages, folder / "modules", Path(standalone_worker.__file__), folder / "tasks.pt")
        return torch.load(folder / "tasks.pt")

    return run


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, bare: Any) -> dict[str, Any]:
    """Results of all tasks, of one process."""
    root = tmp_path_factory.mktemp("standalone")
    ids, mask = left_padded(random_rows(LENGTHS))
    tasks: dict[str, Any] = {}
    for family, kind in CASES:
        folder = str(write(root / f"{family}_{kind}", family, kind))
        tasks[f"{family}_{kind}"] = ("logits", {"folder": folder, "ids": ids, "mask": mask, "pieces": PIECES})
    (row,) = random_rows((20,), seed=3)
    settings = {"ids": row[None], "max_new_tokens": LONG, **VARIED}
    for name in ("neox_paper", "llama_tiers", "llama_hybrid", "llama_no_initial"):
        ids_long, mask_long = left_padded(random_rows(EVICTED, seed=1))
        pieces = [180, 1, 1, 120, *[1] * 18, 100]
        task = {"folder": str(root / name), "ids": ids_long, "mask": mask_long, "pieces": pieces}
        tasks[f"evicted {name}"] = ("logits", task)
    for kind in ("paper", "tiers"):
        tasks[f"long {kind}"] = ("generate", {"folder": str(root / f"llama_{kind}"), **settings})
    tasks["lookup"] = ("generate", {"folder": str(root / "llama_paper"), **settings, "prompt_lookup_num_tokens": 4})
    beams = {"folder": str(root / "neox_tiers"), "ids": ids[:, -30:], "max_new_tokens": 9, "num_beams": 3}
    tasks["beams"] = ("generate", {**beams, "do_sample": False})
    for kind in (False, True):
        tasks[f"gradients {kind}"] = (
            "gradients",
            {"folder": str(root / "neox_paper"), "ids": ids[:1], "checkpointing": kind},
        )
    for family in ("neox", "llama"):
        (root / f"copies {family}").mkdir()
        tasks[f"copies {family}"] = (
            "copies",
            {"folder": str(root / f"{family}_paper"), "ids": ids[:1], "out": str(root / f"copies {family}")},
        )
        (root / f"refused {family}").mkdir()
        tasks[f"refused {family}"] = (
            "refusals",
            {"folder": str(root / f"{family}_paper"), "ids": ids[:1], "out": str(root / f"refused {family}")},
        )
    return {**bare(root, tasks), "root": root}


def test_in_short(bare: Any, tmp_path: Path) -> None:
    """Two patterns at once and in pieces, without this package."""
    rows = random_rows(LENGTHS)
    ids, mask = left_padded(rows)
    cases = {"neox": "tiers", "llama": "hybrid"}
    inputs = {"ids": ids, "mask": mask, "pieces": PIECES}
    folders = {family: str(write(tmp_path / family, family, kind)) for family, kind in cases.items()}
    results = bare(tmp_path, {family: ("logits", {"folder": folders[family], **inputs}) for family in cases})
    for family, kind in cases.items():
        result = results[family]
        for number, row in enumerate(rows):
            known = expected(family, patterns(tiny(family, 3))[kind], row)
            for logits in (result["whole"], result["pieces"]):
                torch.testing.assert_close(logits[number, LENGTHS[0] - len(row) :], known, **TOLERANCE)
        assert torch.equal(result["greedy"], result["uncached"])


def with_package(root: Path, name: str) -> Any:
    return load_model(root / name, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), CASES, ids=lambda name: name)
def test_logits_are_those_of_the_definition_and_of_the_package(found: dict[str, Any], family: str, kind: str) -> None:
    """Of a ragged batch, at once, in pieces with a cache, and token by token."""
    result = found[f"{family}_{kind}"]
    rows = random_rows(LENGTHS)
    ids, mask = left_padded(rows)
    packaged = with_package(found["root"], f"{family}_{kind}")(input_ids=ids, attention_mask=mask).logits
    for number, row in enumerate(rows):
        known = expected(family, patterns(tiny(family, 3))[kind], row)
        own = slice(LENGTHS[0] - len(row), None)
        for logits in (result["whole"], result["pieces"], packaged):
            torch.testing.assert_close(logits[number, own], known, **TOLERANCE)
    assert result["class"].startswith("Sep") and torch.equal(result["greedy"], result["uncached"])


@pytest.mark.slow
def test_cache_drops_what_is_not_seen_again(found: dict[str, Any]) -> None:
    """In pieces that pass its slack; and greedy tokens are those of the package's cache."""
    (row,) = random_rows((20,), seed=3)
    for kind in ("paper", "tiers"):
        model = with_package(found["root"], f"llama_{kind}")
        cache = {cache_argument(model): PatternCache(model)}
        tokens = model.generate(row[None], max_new_tokens=LONG, **VARIED, **cache)
        assert len(set(tokens[0].tolist())) > 30
        sequences, widths = found[f"long {kind}"]
        assert torch.equal(sequences, tokens)
        # Beyond the local window of 6 there are separators and initial tokens alone, and the slack.
        kept = int((patterns(model)[kind].tier_of_token[tokens] > 0).sum()) + 9
        assert max(widths) <= kept + 128 < tokens.shape[1], (widths, kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["neox_paper", "llama_tiers", "llama_hybrid", "llama_no_initial"])
def test_logits_after_keys_were_dropped(found: dict[str, Any], name: str) -> None:
    """Of a ragged batch, as without a cache, which the test above holds to the definition."""
    result, (_, mask) = found[f"evicted {name}"], left_padded(random_rows(EVICTED, seed=1))
    torch.testing.assert_close(result["pieces"][mask > 0], result["whole"][mask > 0], **TOLERANCE)
    columns, last = EVICTED[0], result["widths"][-1]
    assert last[1] < columns / 2 and (last[0] < columns) == (name != "llama_hybrid"), result["widths"]


@pytest.mark.slow
def test_other_ways_to_generate(found: dict[str, Any]) -> None:
    """Drafts that are taken back, and beams."""
    assert torch.equal(found["lookup"][0], found["long paper"][0])
    ids, _ = left_padded(random_rows(LENGTHS))
    model = with_package(found["root"], "neox_tiers")
    tokens = model.generate(ids[:, -30:], max_new_tokens=9, num_beams=3, do_sample=False)
    assert torch.equal(found["beams"][0], tokens)


@pytest.mark.slow
def test_gradients_are_those_of_the_package(found: dict[str, Any]) -> None:
    ids, _ = left_padded(random_rows(LENGTHS))
    model = with_package(found["root"], "neox_paper").train()
    with torch.enable_grad():
        model(input_ids=ids[:1], labels=ids[:1]).loss.backward()
    for checkpointing in (False, True):
        torch.testing.assert_close(
            found[f"gradients {checkpointing}"], model.get_input_embeddings().weight.grad, **TOLERANCE
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["neox", "llama"])
def test_copies_keep_the_pattern_or_are_refused(found: dict[str, Any], family: str) -> None:
    results, known = found[f"copies {family}"], found[f"{family}_paper"]["whole"][:1]
    names = [name.removesuffix(" remote") for name in results if name.endswith(" remote")]
    assert {"files", "saved", "deep", "bf16", "shards", "again"} <= set(names)
    full = tiny(family, layers=3)(input_ids=left_padded(random_rows(LENGTHS))[0][:1]).logits
    for name in names:
        # The adapter's own folder has no config.json, and an untrained one changes nothing.
        if name != "adapter":
            assert 'attn_implementation="sepllm"' in results[name], (name, results[name])
        if name == "config":
            assert "modeling_sepllm.py" in results["config remote"]
            continue
        near = 0.3 if name == "bf16" else 1e-4
        assert (results[f"{name} remote"] - known).abs().max() < near, name
    # int8 weights change the logits, and full attention changes them much more.
    quantised = (results["quantised"] - known).abs().mean()
    assert quantised < (full - known).abs().mean() / 3, (quantised, (full - known).abs().mean())
    if "merged" in names:
        assert torch.equal(results["adapter generated"], found[f"{family}_paper"]["greedy"][:1])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["neox", "llama"])
def test_refusals_are_one_sentence(found: dict[str, Any], family: str) -> None:
    words = {
        "plain": 'attn_implementation="sepllm"',
        "cache": "a DynamicCache does not suit the pattern",
        "embeddings": "the call has no input_ids",
        "mask": "attention_mask must have two dimensions",
        "right": "padding after its first token: pad on the left",
        "rows": "the cache holds 1 rows and was given 3",
        "crop": "cannot go back: call activate_past_recording",
        "changed": "the model's attention was changed to another",
        "incomplete": "the files lack weights of the model: lm_head.weight",
        "without the file": "modeling_sepllm.py",
        "older": "needs transformers 5.5 or newer and 5.4.2 is installed",
    }
    for name, expected_words in words.items():
        assert expected_words in found[f"refused {family}"][name], (name, found[f"refused {family}"][name])


def test_package_takes_over_where_it_is_installed(monkeypatch: Any, tmp_path: Path) -> None:
    """Its kernels compute the attention, its cache holds the keys, and copies have the module again."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        write(tmp_path / "neox", "neox", "tiers"), trust_remote_code=True
    )
    rows = random_rows(LENGTHS[:2])
    ids, mask = left_padded(rows)
    assert model.base_model.sepllm_pattern.kernel and type(model).__name__ == "SepGPTNeoXForCausalLM"
    logits = model.eval()(input_ids=ids, attention_mask=mask).logits
    for row, own in zip(rows, logits, strict=True):
        known = expected("neox", tiers(tiny("neox", 3)), row)
        torch.testing.assert_close(own[len(ids[0]) - len(row) :], known, **TOLERANCE)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    assert isinstance(output[cache_argument(model)], PatternCache)
    model.save_pretrained(tmp_path / "remote")
    load_model(tmp_path / "remote", trust_remote_code=True).save_pretrained(tmp_path / "stock")
    for name in ("remote", "stock"):
        assert (tmp_path / name / MODULE.name).read_bytes() == MODULE.read_bytes()
        content = json.loads((tmp_path / name / "config.json").read_text())
        assert content["attn_implementation"] == "sepllm"
        assert content["auto_map"] == {"AutoModelForCausalLM": "modeling_sepllm.SepGPTNeoXForCausalLM"}
        assert content["architectures"] == ["SepGPTNeoXForCausalLM"]
    dense = load_model(tmp_path / "stock", trust_remote_code=True, dense=True)
    assert (dense(input_ids=ids).logits[:1] - logits[:1]).abs().max() > 1e-3


@pytest.mark.slow
def test_exported_run(exported: Path, bare: Any, tmp_path: Path) -> None:
    """A run that was trained here: bf16 weights, documents, two layers with all keys."""
    ids = torch.randint(4096, (2, 64), generator=torch.Generator().manual_seed(0))
    ids[:, [20, 41]] = 1
    mask = torch.ones_like(ids)
    task = {"folder": str(exported), "ids": ids, "mask": mask, "pieces": [40, *[1] * 24]}
    result = bare(tmp_path, {"run": ("logits", task)})["run"]
    model = apply_pattern(load_model(exported), implementation="mask")
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(result["whole"].float(), logits.float(), atol=2e-2, rtol=0)
    assert result["whole"].dtype == torch.bfloat16
    (exported / MODULE.name).read_text().encode().decode("ascii")


def test_module_is_short() -> None:
    assert len(MODULE.read_text().splitlines()) < 300


@pytest.mark.slow
def test_two_thousand_greedy_tokens_are_those_of_the_package(bare: Any, tmp_path: Path) -> None:
    (row,) = random_rows((40,), seed=3)
    settings = {"max_new_tokens": 2000, **VARIED}
    for family in ("neox", "llama"):
        folder = write(tmp_path / family, family, "tiers")
        model = load_model(folder)
        tokens = model.generate(row[None], **settings, **{cache_argument(model): PatternCache(model)})
        task = {"folder": str(folder), "ids": row[None], **settings}
        sequences, widths = bare(tmp_path, {"long": ("generate", task)})["long"]
        assert torch.equal(sequences, tokens) and tokens.shape[1] == 2040
        assert max(widths) < 1500, widths


def test_rows_of_a_cache_are_chosen_and_repeated() -> None:
    model = alone("llama", "paper")
    first, second = random_rows((40, 40))
    rows = torch.stack((first, second))
    name = cache_argument(model)
    for change, order in (
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    ):
        cache = model(input_ids=rows[:, :30], use_cache=True)[name]
        change(cache)
        found = model(input_ids=rows[order, 30:], **{name: cache}).logits
        known = model(input_ids=rows[order], use_cache=False).logits[:, 30:]
        torch.testing.assert_close(found, known, **TOLERANCE)


def test_several_documents_in_a_row_are_refused() -> None:
    (row,) = random_rows((20,))
    with pytest.raises(ValueError, match="several documents in a row"):
        alone("llama", "paper")(input_ids=row[None], position_ids=torch.arange(10).repeat(2)[None], use_cache=False)


def test_tokens_that_were_added_are_no_separators() -> None:
    model = alone("llama", "paper")
    model.resize_token_embeddings(VOCABULARY + 8)
    (row,) = random_rows((20,))
    row[4] = VOCABULARY + 3
    assert model(input_ids=row[None]).logits.isfinite().all()


def alone(family: str, kind: str) -> Any:
    """A model as a program without this package has it, in this process."""
    from sepllm_train.hf import modeling_sepllm

    model = tiny(family, layers=3)
    config = model.config
    config.sepllm_attention = patterns(model)[kind].to_dict()
    names = {"llama": "SepLlamaForCausalLM", "neox": "SepGPTNeoXForCausalLM"}
    made = type(names[family], (getattr(modeling_sepllm, names[family]),), {"kernels": False})(config)
    made.load_state_dict(model.state_dict())
    return made.eval()

"""Our checkpoints as models of transformers and the other way: the same tensors, the same logits, or one sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.tokenizers import load_tokenizer
from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import AttentionConfig, ModelConfig
from sepllm_train.distributed.launch import alone
from sepllm_train.model.pattern import resolve_pattern
from sepllm_train.runs.open import find_checkpoint, open_run, read_config
from sepllm_train.training.checkpoint.load import whole_tensors
from tests.support.distributed_runner import run_ranks

transformers = pytest.importorskip("transformers", reason="transformers is an optional package: extra hf")

from sepllm_train.generation.pattern import TokenPattern  # noqa: E402
from sepllm_train.hf import export, weights  # noqa: E402
from sepllm_train.hf.architecture import attention_of  # noqa: E402
from sepllm_train.hf.export import export_run, in_memory  # noqa: E402
from sepllm_train.hf.importing import import_model  # noqa: E402
from sepllm_train.hf.verify import logits_of  # noqa: E402
from tests.hf.bridge_models import LLAMA_BLOCK, MODELS, VOCABULARY  # noqa: E402
from tests.hf.bridge_worker import split_logits  # noqa: E402
from tests.support.command import program  # noqa: E402
from tests.support.waiting import HANG_SECONDS  # noqa: E402

# ------------------------------------------------------------------------------------------------------------- mapping


@pytest.mark.parametrize("family", [weights.NEOX, weights.LLAMA, weights.QWEN3], ids=["neox", "llama", "qwen3"])
def test_mapping_there_and_back_changes_no_bit(family: weights.Family) -> None:
    neox = family is weights.NEOX
    model = ModelConfig(layers=2, hidden=24, heads=6, ffn=20, **({} if neox else LLAMA_BLOCK | {"kv_heads": 3}))
    rows = {"self_attention.linear_qkv": 24 * 3 if neox else 4 * (6 + 2 * 3), "mlp.linear_fc1": 20 if neox else 40}
    theirs: dict[str, torch.Tensor] = {}
    ours = {name: torch.randn(2, rows.get(name.rsplit(".", 1)[0], 24), 5) for name in family.inside}
    for name, whole in ours.items():
        theirs |= weights.to_theirs(family, model, 10, f"decoder.layers.{name}", whole)
    table = torch.randn(12, 24)
    theirs |= weights.to_theirs(family, model, 10, weights.EMBEDDING, table)
    for name, whole in ours.items():
        for layer in range(2):
            back = weights.to_ours(family, model, f"decoder.layers.{layer}.{name}", theirs.__getitem__)
            assert torch.equal(back, whole[layer]), name
    assert torch.equal(weights.to_ours(family, model, weights.EMBEDDING, theirs.__getitem__), table[:10])
    assert len({tensor.data_ptr() for tensor in theirs.values()}) == len(theirs), "no two share their memory"


ATTENTIONS = [
    {"pattern": "dense"},
    {"window": 8},
    {"window": [8, 16, 4], "full_layers": [1], "separators": "all", "separate_documents": True},
    {"separators": [{"classes": ["period"], "horizon": "forever"}, {"classes": ["comma", "colon"], "horizon": 40}]},
    {"separators": [{"classes": ["comma"], "horizon": 40}], "initial_tokens": 0},
    {"pattern": "streaming", "window": 5, "initial_tokens": 7},
    {"pattern": "fixed", "interval": 6},
]


@pytest.mark.parametrize("settings", ATTENTIONS, ids=str)
def test_attention_of_an_exported_pattern_gives_that_pattern(settings: dict[str, Any]) -> None:
    classes = np.arange(60, dtype=np.uint8) % 30
    classes[classes > 23] = 0
    pattern = TokenPattern.of_run(resolve_pattern(AttentionConfig(**settings), 3), classes, end_of_document=5)
    found = attention_of(TokenPattern.from_dict(json.loads(json.dumps(pattern.to_dict()))), classes)
    assert found is not None
    again = TokenPattern.of_run(resolve_pattern(found, 3), classes, end_of_document=5)
    assert again.to_dict() == pattern.to_dict()


def test_separators_that_are_no_classes_have_no_attention() -> None:
    classes = np.array([0, 0, 1, 1, 2], dtype=np.uint8)
    for separators in ([2], [2, 3, 0]):
        assert attention_of(TokenPattern.from_separators(separators, 5, 3, window=4, initial=1), classes) is None
    assert attention_of(TokenPattern.from_separators([2, 3], 5, 3, window=4, initial=1), None) is None


# --------------------------------------------------------------------------------------------------- import and export


@pytest.mark.parametrize("name", MODELS)
def test_imported_and_exported_again_is_bitwise_the_same(
    models: Callable[[str], Path], tmp_path: Path, name: str, capsys: Any
) -> None:
    folder = models(name)
    export_run(open_run(folder / "ours"), tmp_path / "again")
    line = capsys.readouterr().out.strip()
    assert "largest difference of logits" in line and ("fixed" in line) == (name == "mistral")
    before, after = (load_file(path / "model.safetensors") for path in (folder / "theirs", tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    import_model(tmp_path / "again", tmp_path / "ours")
    first, second = (dict(whole_tensors(find_checkpoint(f))) for f in (folder / "ours", tmp_path / "ours"))
    shared = [key for key in first if not key.startswith("rng.")]
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in shared)
    one, other = (read_config(f) for f in (folder / "ours", tmp_path / "ours"))
    assert replace(other.model, name="", kv_heads=None) == replace(one.model, name="", kv_heads=None)
    assert other.model.query_groups == one.model.query_groups
    expected, found = (open_run(f).token_pattern for f in (folder / "ours", tmp_path / "ours"))
    assert found.to_dict() == expected.to_dict() and found.dense == (name == "qwen3")


@pytest.mark.distributed
def test_imported_checkpoint_loads_with_tensor_parallelism(models: Callable[[str], Path], tmp_path: Path) -> None:
    import_model(models("llama, grouped, tied") / "theirs", tmp_path / "ours")
    tokens = [7, 3000, VOCABULARY - 1, 12, 0, 999]
    parts = run_ranks(split_logits, 2, folder=str(tmp_path / "ours"), tokens=tokens, tensor=2)
    logits = torch.tensor([*parts[0], *parts[1]])
    model = transformers.AutoModelForCausalLM.from_pretrained(models("llama, grouped, tied") / "theirs")
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0, -1]
    assert (logits[:VOCABULARY] - expected).abs().max() < 1e-4
    assert (logits[VOCABULARY:] == -1e9).all(), "padding has no probability"


def test_weights_of_several_types_are_held_by_the_widest(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Whatever config.json says."""
    shutil.copytree(models("llama") / "theirs", tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    mixed = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(mixed, tmp_path / "theirs" / "model.safetensors")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    assert read_config(tmp_path / "ours").training.precision == "fp32"
    save_file({name: tensor.double() for name, tensor in mixed.items()}, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(UserError, match="has weights of type .*F64"):
        import_model(tmp_path / "theirs", tmp_path / "other")


def test_data_of_the_tokenizer_opens_an_imported_model(
    tmp_path: Path, models: Callable[[str], Path], sample_prefix: Path
) -> None:
    import_model(
        models("neox") / "theirs", tmp_path / "ours", attention=["pattern=sep", "window=8"], data=[str(sample_prefix)]
    )
    with alone():
        run = open_run(tmp_path / "ours")
        assert len(run.validation) > 0 and run.model is not None and run.checkpoint.step == 0
    assert json.loads((tmp_path / "ours" / "run.json").read_text())["status"] == "imported"


# ------------------------------------------------------------------------------------------------------- a trained run


def test_exported_run_gives_the_logits_of_the_run_on_its_held_out_text(trained: Path, exported: Path) -> None:
    """With the classes and documents of the data's side-car on our side, and token ids alone on theirs."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        exported, dtype=torch.float32, attn_implementation="eager"
    )
    pattern = TokenPattern.from_dict(theirs.config.sepllm_attention)
    config = transformers.AutoConfig.from_pretrained(exported)
    assert (config.dtype, config.vocab_size, config.eos_token_id) == (torch.bfloat16, 4096, 1)
    differences, masked = [], []
    with alone():
        run = open_run(trained)
        model = run.model.float()
        model.config.params_dtype = torch.float32
        for number in range(4):
            sample = {key: value[None] for key, value in run.validation[number].items()}
            plan = run.pattern.plan(sample["separator_class"], sample["document_start"])
            with torch.no_grad():
                expected = model(sample["tokens"], plan)
            found = logits_of(theirs, pattern, sample["tokens"])
            differences.append((found - expected).abs().max())
            masked.append((logits_of(theirs, None, sample["tokens"]) - expected).abs().max())
    assert max(differences) < 1e-4 < min(masked), (differences, masked)


def test_plain_loading_fails_and_full_attention_is_asked_for(exported: Path) -> None:
    program = f"""
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM, pipeline
folder = {str(exported)!r}
for load in (
    lambda: AutoModelForCausalLM.from_pretrained(folder),
    lambda: GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32),
    lambda: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)),
    lambda: pipeline("text-generation", model=folder),
):
    try:
        load()
    except (ValueError, RuntimeError) as error:
        assert 'attn_implementation="sepllm"' in str(error), error
        continue
    raise SystemExit("it loaded")
AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
print(AutoTokenizer.from_pretrained(folder)("A line.\\n\\nNext  one").input_ids)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ids = load_tokenizer(exported / "tokenizer.model").encode_batch(["A line.\n\nNext  one"])[0]
    assert json.loads(done.stdout) == ids


def test_run_in_memory_needs_no_data(trained: Path, tokenizer: Path, tmp_path: Path) -> None:
    """The run's data is gone but for its tokenizer, which has another name now."""
    shutil.copytree(trained, tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text()
    moved = config.replace("source: sample", "source: prefixes").replace(
        "\n  prefixes: []", "\n  prefixes: [/nowhere/books]"
    )
    (tmp_path / "run" / "config.yaml").write_text(moved)
    with pytest.raises(UserError, match="is not found beside its data .*/nowhere/books.*--tokenizer"):
        in_memory(open_run(tmp_path / "run"))
    shutil.copyfile(tokenizer, tmp_path / "renamed.model")
    run, usual = open_run(tmp_path / "run", tokenizer=tmp_path / "renamed.model"), open_run(trained, 2)
    pattern, model, same = run.token_pattern, in_memory(run), in_memory(usual, dtype=None)
    assert not pattern.dense and pattern.to_dict() == usual.token_pattern.to_dict()
    assert pattern.end_of_document == run.tokenizer.eod == 1 and len(set(pattern.windows)) == 2
    assert (model.dtype, same.dtype) == (torch.float32, torch.bfloat16)
    assert all(torch.equal(a, b.float()) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def test_side_car_tells_classes_that_it_counts_as_one(trained: Path, sample_prefix: Path, tmp_path: Path) -> None:
    """Of a side-car made before a class was split, whose tokens were trained as the older one's."""
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(sample_prefix.parent, tmp_path / "data")
    header = json.loads((tmp_path / "data" / "docs.sep.json").read_text())
    period = next(entry for entry in header["classes"] if entry["name"] == "period")
    comma = next(entry for entry in header["classes"] if entry["name"] == "comma_mixed")
    moved, period["ids"] = period["ids"], []
    comma["ids"] += moved
    comma["strings"] += period["strings"]
    period["strings"] = []
    (tmp_path / "data" / "docs.sep.json").write_text(json.dumps(header))
    config = (tmp_path / "run" / "config.yaml").read_text()
    prefix = tmp_path / "data" / "docs"
    moved_config = config.replace("source: sample", "source: prefixes").replace(
        "\n  prefixes: []", f"\n  prefixes: [{prefix}]"
    )
    (tmp_path / "run" / "config.yaml").write_text(moved_config)
    pattern, usual = open_run(tmp_path / "run").token_pattern, open_run(trained).token_pattern
    assert set(usual.separators) - set(pattern.separators) == set(moved)


def test_folder_is_there_whole_or_not_at_all(
    trained: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="exists already: choose another name or pass --overwrite"):
        export_run(open_run(trained), exported)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine is not overwritten, since it has no sepllm_export.json"):
        export_run(open_run(trained), tmp_path / "mine", overwrite=True)

    def fail(*_: Any) -> None:
        raise UserError("the two models do not compute the same")

    shutil.copytree(exported, tmp_path / "old")
    monkeypatch.setattr(export, "compare", fail)
    for name in ("new", "old"):
        with pytest.raises(UserError, match="do not compute the same"):
            export_run(open_run(trained), tmp_path / name, overwrite=True)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "old"]
    assert (tmp_path / "old" / "model.safetensors").is_file()
    export_run(open_run(trained), tmp_path / "old", dtype="fp32", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "old"]
    assert load_file(tmp_path / "old" / "model.safetensors")["gpt_neox.embed_in.weight"].dtype == torch.float32
    card = (tmp_path / "old" / "README.md").read_text()
    assert "load_model" in card and "n = 8 tokens in layers 1, 2" in card and "weights in fp32" in card


def test_only_what_export_wrote_is_overwritten(trained: Path, exported: Path, tmp_path: Path) -> None:
    changes: dict[str, Callable[[Path], Any]] = {
        "it has no sepllm_export.json": lambda folder: (folder / "sepllm_export.json").unlink(),
        "its notes/mine.txt is not as": lambda folder: (folder / "notes" / "mine.txt").write_text("mine"),
        "its model.safetensors is not as": lambda folder: os.truncate(folder / "model.safetensors", 1000),
        "its README.md is not as": lambda folder: (folder / "README.md").unlink(),
    }
    for number, (words, change) in enumerate(changes.items()):
        folder = tmp_path / str(number)
        shutil.copytree(exported, folder)
        (folder / "notes").mkdir()
        change(folder)
        before = sorted(folder.rglob("*"))
        with pytest.raises(UserError, match=f"is not overwritten, since {words}.*: choose another name"):
            export_run(open_run(trained), folder, overwrite=True)
        assert sorted(folder.rglob("*")) == before


def test_only_imported_models_without_training_are_overwritten(
    trained: Path, exported: Path, models: Callable[[str], Path], tmp_path: Path
) -> None:
    run, ours = tmp_path / "run", tmp_path / "ours"
    shutil.copytree(trained, run)
    with pytest.raises(UserError, match="run is not overwritten, since the status in its run.json is 'finished'"):
        import_model(exported, run, overwrite=True)
    assert find_checkpoint(run).is_dir()
    shutil.copytree(models("llama") / "ours", ours)
    shutil.copytree(ours / "checkpoints" / "step_00000000", ours / "checkpoints" / "step_00000004")
    with pytest.raises(UserError, match="ours is not overwritten, since it was trained until step_00000004"):
        import_model(exported, ours, overwrite=True)
    shutil.rmtree(ours / "checkpoints" / "step_00000004")
    import_model(exported, ours, overwrite=True)
    assert read_config(ours).model.norm == "layernorm"
    (ours / "run.json").write_text("[]")
    with pytest.raises(UserError, match="the status in its run.json is None, not 'imported'"):
        import_model(exported, ours, overwrite=True)


def test_what_a_killed_overwriting_left_is_put_in_order(trained: Path, exported: Path, tmp_path: Path) -> None:
    output, old = tmp_path / "out", tmp_path / "out.removed.partial"
    shutil.copytree(exported, old)
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(UserError, match="out exists already"):
        export_run(open_run(trained), output)
    assert (output / "model.safetensors").is_file() and not old.exists()
    shutil.copytree(exported, old)
    export_run(open_run(trained), output, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_link_to_an_exported_model_is_replaced_and_its_target_stays(
    trained: Path, exported: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").symlink_to(exported)
    export_run(open_run(trained), tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out").is_symlink() and (exported / "model.safetensors").is_file()


def test_weights_missing_from_the_files_written_raise(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = transformers.GPTNeoXForCausalLM.save_pretrained

    def incomplete(model: Any, folder: Path) -> None:
        save(model, folder)
        tensors = load_file(folder / "model.safetensors")
        del tensors["gpt_neox.final_layer_norm.bias"]
        save_file(tensors, folder / "model.safetensors")

    monkeypatch.setattr(transformers.GPTNeoXForCausalLM, "save_pretrained", incomplete)
    with pytest.raises(RuntimeError, match="do not fill GPTNeoXForCausalLM.*final_layer_norm.bias"):
        export_run(open_run(trained), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_weights_that_were_exchanged_are_noticed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = dict(weights.NEOX.inside)
    first, second = "input_layernorm.weight", "pre_mlp_layernorm.weight"
    inside[first], inside[second] = inside[second], inside[first]
    changed = replace(weights.NEOX, inside=inside)
    monkeypatch.setitem(export.FAMILIES, "gpt_neox", changed)
    with pytest.raises(UserError, match="under dense attention logits differ by up to"):
        export_run(open_run(trained), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_and_import(exported: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(name: str, *arguments: object) -> str:
        program(name)(arguments)
        return capsys.readouterr().out

    out = run("export", trained, tmp_path / "out", "--checkpoint", 2, "--dtype", "fp16")
    assert "GPTNeoXForCausalLM of" in out and "in fp16, from step 2; largest difference of logits" in out
    out = run("import", exported, tmp_path / "ours", "--attention", "window=12", "full_layers=none")
    assert "as step 0 in bf16, attention sep" in out
    attention = read_config(tmp_path / "ours").attention
    assert (attention.window, attention.full_layers, attention.separate_documents) == (12, "none", True)
    with pytest.raises(SystemExit) as ended:
        run("import", exported, tmp_path / "ours")
    assert ended.value.code == 2 and "exists already" in capsys.readouterr().err


def test_one_sentence_without_transformers(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "config.json"):
        (tmp_path / "run" / name).write_text("{}")
    for name in ("export", "import"):
        program = (
            "import sys; sys.modules['transformers'] = None; from sepllm_train.cli.main import main; "
            f"sys.exit(main(['{name}', 'run', 'out']))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=HANG_SECONDS,
            check=False,
        )
        assert done.returncode == 2 and done.stderr.startswith("error: transformers is not installed"), done.stderr
        assert "pip install -e '.[hf]' in the checkout" in done.stderr and done.stderr.count("\n") == 1

"""What import and export refuse, each in one sentence; and tokenizers, which are the same or are left out."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.tokenizers import load_tokenizer
from data_prep.train_tokenizer import train_tokenizer
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import hash_file
from sepllm_train.config.schema import AttentionConfig, Config, ModelConfig
from sepllm_train.runs.open import open_run

transformers = pytest.importorskip("transformers", reason="transformers is an optional package: extra hf")

from sepllm_train.distributed.launch import alone  # noqa: E402
from sepllm_train.evaluation.stream_model import open_model  # noqa: E402
from sepllm_train.evaluation.stream_state import save_state  # noqa: E402
from sepllm_train.hf.architecture import model_type  # noqa: E402
from sepllm_train.hf.export import export_run, in_memory  # noqa: E402
from sepllm_train.hf.importing import import_model  # noqa: E402
from sepllm_train.hf.tokenizer import save_tokenizer, to_transformers  # noqa: E402
from tests.hf.bridge_models import LLAMA_BLOCK, VOCABULARY  # noqa: E402

# ---------------------------------------------------------------------------------------------------------- tokenizers


def test_sentencepiece_becomes_a_tokenizer_with_the_same_ids(tokenizer: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(tokenizer)
    assert save_tokenizer(ours, tmp_path) is None
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "One line.\n\n  Two  spaces\tand a tab, naïve 中文 👍🏽\u200b; x == y\r\n"
    assert theirs(text).input_ids == ours.encode_batch([text])[0]
    assert theirs.decode(theirs(text).input_ids) == text and theirs.eos_token_id == ours.eod


NAMES = ("<unk>", "<s>", "</s>", "<pad>", "<0x0A>", "<|endoftext|>", "<|padding|>", "\u2581")


def texts_with_names() -> list[str]:
    """Names of special tokens in texts, alone, at either end and next to each other."""
    around = [
        text for name in NAMES for text in (name, f"{name}a", f"A {name} of {name}.", f"x{name}{name}\n", f" {name}")
    ]
    return [*around, "".join(NAMES), " ".join(NAMES)]


@pytest.mark.parametrize("kind", ["sentencepiece", "trained on names", "20B", "gpt2", "not marked special"])
def test_names_of_special_tokens_in_a_text_are_text(kind: str, tokenizer: Path, tmp_path: Path, request: Any) -> None:
    """In memory, written, and read again by transformers alone, as in training."""
    path = tokenizer
    if kind == "trained on names":
        words = [f"the <unk> of {number * 7919} </s> <unk>s, <0x0A> word{number}.\n" for number in range(3000)]
        path = tmp_path / "names.model"
        train_tokenizer(words, path, vocab_size=500)
    elif kind != "sentencepiece":
        name = "gpt2" if kind == "gpt2" else "20B"
        path = tmp_path / "tokenizer.json"
        source = request.getfixturevalue("shared_data") / "tokenizers" / f"{name}_tokenizer.json"
        content = json.loads(source.read_text(encoding="utf8"))
        if kind == "not marked special":
            for added in content["added_tokens"]:
                added["special"] = added["content"] == "<|endoftext|>"
        path.write_text(json.dumps(content), encoding="utf8")
    ours = load_tokenizer(path)
    (tmp_path / "out").mkdir()
    made = [to_transformers(ours)]
    assert save_tokenizer(ours, tmp_path / "out") is None
    made.append(transformers.AutoTokenizer.from_pretrained(tmp_path / "out"))
    made[1].save_pretrained(tmp_path / "copy")
    made.append(transformers.AutoTokenizer.from_pretrained(tmp_path / "copy"))
    texts = texts_with_names()
    expected = ours.encode_batch(texts)
    for theirs in made:
        found = theirs(texts).input_ids
        wrong = [text for text, one, other in zip(texts, found, expected, strict=True) if one != other]
        assert not wrong
        assert [theirs.decode(ids) for ids in expected] == [ours.decode(ids) for ids in expected]
        assert theirs.eos_token_id == ours.eod


def test_tokenizer_that_transformers_cannot_have_is_kept_as_it_is(tmp_path: Path) -> None:
    words = [f"word{number} and, {number * 7919}.\n" for number in range(3000)]
    train_tokenizer(words, tmp_path / "unigram.model", vocab_size=400, model_type="unigram")
    (tmp_path / "out").mkdir()
    reason = save_tokenizer(load_tokenizer(tmp_path / "unigram.model"), tmp_path / "out")
    assert reason is not None and "is not a BPE model" in reason
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokenizer.model"]


def test_tokenizer_json_loses_what_would_add_tokens(shared_data: Path, tmp_path: Path) -> None:
    definition = json.loads((shared_data / "tokenizers" / "20B_tokenizer.json").read_text(encoding="utf8"))
    template = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": list(template),
        "pair": list(template),
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    definition["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf8")
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    text = "A somewhat longer text, of more than five tokens."
    assert to_transformers(ours)(text).input_ids == ours.encode_batch([text])[0]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("model", "attention", "words"),
    [
        ({}, {"sink": "learned"}, "attention.sink=learned cannot be exported"),
        ({}, {"qk_norm": True}, "attention.qk_norm=true cannot be exported with GPT-NeoX"),
        ({"kv_heads": 2}, {}, "model.kv_heads=2 cannot be exported with model.norm=layernorm"),
        ({"rotary_fraction": 0.0}, {}, "model.rotary_fraction=0 cannot be exported"),
        ({"bias": False}, {}, "model.bias=false cannot be exported"),
        (LLAMA_BLOCK | {"parallel_residual": True}, {}, "model.parallel_residual=true cannot be exported"),
        (LLAMA_BLOCK | {"rotary_fraction": 0.5}, {}, "model.rotary_fraction=0.5 cannot be exported"),
        (LLAMA_BLOCK | {"activation": "gelu"}, {}, "model.activation=gelu and model.bias=false cannot be exported"),
    ],
)
def test_what_no_class_of_transformers_has_is_refused(
    model: dict[str, Any], attention: dict[str, Any], words: str
) -> None:
    shape = {"layers": 2, "hidden": 32, "heads": 4, "ffn": 64}
    with pytest.raises(UserError, match=words):
        model_type(Config(model=ModelConfig(**(shape | model)), attention=AttentionConfig(**attention)))


def test_separators_by_place_and_foreign_tokenizers_are_refused(
    trained: Path, models: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("placement: natural", "placement: shuffled"))
    with pytest.raises(UserError, match="attention.placement=shuffled of .* is for training alone"):
        in_memory(open_run(tmp_path / "run"))
    train_tokenizer([f"other {n} words, {n * 7919}.\n" for n in range(999)], tmp_path / "other.model", vocab_size=320)
    with pytest.raises(UserError, match="other.model is not the tokenizer that .* was trained with"):
        in_memory(open_run(trained, tokenizer=tmp_path / "other.model"))
    with pytest.raises(UserError, match="has no checkpoint of step 7"):
        open_run(trained, 7)


def test_older_weights_are_exported_only_by_their_step(trained: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(trained, run)
    newest = run / "checkpoints" / "step_00000003"
    shutil.copytree(run / "checkpoints" / "step_00000002", newest)
    (newest / "common.pt").unlink()
    words = f"the newest checkpoint {newest} is damaged ({newest / 'common.pt'} is missing): give --checkpoint 2 to"
    with pytest.raises(UserError, match=re.escape(words)):
        export_run(open_run(run), out)
    assert not out.exists()
    export_run(open_run(run, 2), out)
    assert (out / "config.json").is_file()


def test_weights_beyond_the_type_are_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(models("llama") / "theirs", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][5, 3] = 1e6
    save_file(tensors, folder / "model.safetensors")
    import_model(folder, tmp_path / "ours")
    with pytest.raises(UserError, match="weights in model.embed_tokens.weight that torch.float16 cannot hold"):
        export_run(open_run(tmp_path / "ours"), tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=["nan", "inf"])
def test_weights_that_are_no_numbers_are_refused(models: Callable[[str], Path], tmp_path: Path, value: float) -> None:
    """In entries of the vocabulary that no compared token has, too."""
    folder, name = tmp_path / "theirs", "model.layers.1.mlp.up_proj.weight"
    shutil.copytree(models("llama") / "theirs", folder)
    tensors = load_file(folder / "model.safetensors")
    for place in (name, "model.embed_tokens.weight"):
        changed = {**tensors, place: tensors[place].clone()}
        changed[place][4, 1] = value
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        for refuse in (
            lambda: import_model(folder, tmp_path / "ours"),
            lambda: open_model(str(folder), None, "fp32", "cpu"),
        ):
            with pytest.raises(UserError, match=f"has 1 of .* weights in {place} that are NaN or infinite in float32"):
                refuse()
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_run_with_weights_that_are_no_numbers_is_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    """By export, evaluation and whatever else loads its model."""
    folder, run = tmp_path / "theirs", tmp_path / "ours"
    shutil.copytree(models("llama") / "theirs", folder)
    tensors = load_file(folder / "model.safetensors")
    mark = torch.tensor(1234567.875)
    tensors["model.embed_tokens.weight"][4000, 3] = mark
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    import_model(folder, run)
    (shard,) = (run / "checkpoints" / "step_00000000").glob("*.distcp")
    content, bad = shard.read_bytes(), torch.tensor(float("nan")).numpy().tobytes()
    assert content.count(mark.numpy().tobytes()) == 1
    manifest = shard.with_name("manifest.json")
    before = hash_file(shard).sha256
    shard.write_bytes(content.replace(mark.numpy().tobytes(), bad))
    manifest.write_text(manifest.read_text().replace(before, hash_file(shard).sha256))
    words = "has 1 of .* weights in embedding.word_embeddings.weight that are NaN or infinite"
    with pytest.raises(UserError, match=words):
        export_run(open_run(run), tmp_path / "out")
    with pytest.raises(UserError, match=words):
        open_model(str(run), None, "fp32", "cpu")
    opened = open_run(run)
    with alone(opened.config), pytest.raises(UserError, match=words):
        opened.load_model()
    assert not (tmp_path / "out").exists()


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Files of this process end at `size` bytes, as on a full disk."""
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_weights_that_the_disk_cannot_hold_are_one_sentence(models: Callable[[str], Path], tmp_path: Path) -> None:
    run = open_run(models("llama") / "ours")
    with (
        disk_of(100_000),
        pytest.raises(UserError, match=f"cannot write {tmp_path / 'out'} .*(File too large|os error)"),
    ):
        export_run(run, tmp_path / "out")
    cache = SimpleNamespace(
        offset=torch.zeros(50_000), tokens=torch.zeros(1), ended=torch.zeros(1), held=[], layers=[], columns_seen=0
    )
    with (
        disk_of(100_000),
        pytest.raises(UserError, match=f"cannot write {tmp_path / 'state'} .*(File too large|os error)"),
    ):
        save_state(tmp_path, cache, {})
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_the_disk_cannot_hold(tokenizer: Path, tmp_path: Path) -> None:
    with disk_of(tokenizer.stat().st_size + 1), pytest.raises(OSError, match="os error"):
        save_tokenizer(load_tokenizer(tokenizer), tmp_path)


def test_message_on_a_damaged_checkpoint_has_the_cause(trained: Path, tmp_path: Path) -> None:
    """Not the name of the error in which torch wraps those of all ranks."""
    shutil.copytree(trained, tmp_path / "run")
    run = open_run(tmp_path / "run")
    for shard in run.checkpoint.path.glob("*.distcp"):
        shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match="cannot be read") as refused:
        export_run(run, tmp_path / "out")
    assert "Weights only load failed" in str(refused.value) and "ranks" not in str(refused.value)


PATTERN = {
    "format": 1,
    "windows": [8, 8, 8],
    "initial_tokens": 1,
    "tiers": [],
    "interval": None,
    "end_of_document": None,
    "vocabulary": VOCABULARY,
}
CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "bloom"}, "is of a bloom model: those that can be imported are gpt_neox"),
    ("llama", {"model_type": ["llama"]}, r"is of a \['llama'\] model: those that can be imported"),
    ("llama", {"sepllm_attention": "sep"}, "sepllm_attention in .*config.json cannot be used: the separator pattern"),
    ("llama", {"sepllm_attention": PATTERN | {"format": 7}}, "cannot be used: .*format 7 is not 1"),
    ("llama", {"sepllm_attention": PATTERN | {"vocabulary": -1}}, "cannot be used: .*vocabulary -1"),
    ("llama", {"sepllm_attention": PATTERN | {"interval": "9"}}, "cannot be used: .*interval '9'"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rotary embedding dynamic in config.json cannot be imported: ours are linear, yarn, llama3",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "offset": 3}},
        "config.json: there is no key model.rotary_scaling.offset",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5}},
        "config.json: model.rotary_scaling.factor=0.5 must be at least 1",
    ),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.5}}, "rope_theta=1000.5 cannot"),
    ("llama", {"head_dim": 16}, "head_dim=16 in config.json cannot be imported"),
    ("llama", {"attention_bias": True}, "attention_bias=True in config.json cannot be imported"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True in config.json cannot be imported"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu in config.json cannot be imported"),
    ("llama", {"intermediate_size": 64}, "asks for"),
    ("llama", {"num_hidden_layers": 4}, "has no tensor"),
    ("llama", {"num_hidden_layers": 2}, "which our model has no place for"),
    ("mistral", {"sliding_window": 32}, "sliding_window=32 in config.json cannot be imported"),
    ("neox", {"hidden_act": "relu"}, "hidden_act=relu in config.json cannot be imported"),
]


@pytest.mark.parametrize(("name", "change", "words"), CONFIGS, ids=[words for _, _, words in CONFIGS])
def test_models_that_ours_is_not_are_refused(
    models: Callable[[str], Path], tmp_path: Path, name: str, change: dict[str, Any], words: str
) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(models(name) / "theirs", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=words):
        import_model(folder, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_folders_without_safetensors_are_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config.json does not exist: give the folder of a transformers model"):
        import_model(tmp_path, tmp_path / "ours")
    shutil.copyfile(models("llama") / "theirs" / "config.json", tmp_path / "config.json")
    with pytest.raises(UserError, match="has no model.safetensors"):
        import_model(tmp_path, tmp_path / "ours")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="has its weights as pickles"):
        import_model(tmp_path, tmp_path / "ours")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    with pytest.raises(UserError, match="files outside of the folder"):
        import_model(tmp_path, tmp_path / "ours")


def test_shards_that_are_missing_wrong_or_truncated_are_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(models("llama") / "theirs", folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {f"{number}.safetensors": names[number::2] for number in range(2)}
    index = {"metadata": {}, "weight_map": {name: file for file, mine in files.items() for name in mine}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, mine in files.items():
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
    import_model(folder, tmp_path / "ours")
    changes: list[Callable[[Path], Any]] = [
        lambda path: os.truncate(path, path.stat().st_size - 8),
        lambda path: os.truncate(path, 4),
        lambda path: shutil.copyfile(folder / "0.safetensors", path),
        lambda path: path.unlink(),
    ]
    for change in changes:
        change(folder / "1.safetensors")
        with pytest.raises(UserError, match="1.safetensors cannot be read .*: copy it again"):
            import_model(folder, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_model_that_transformers_cannot_load_is_refused(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("metadata")

    folder = models("llama") / "theirs"
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(UserError, match="transformers cannot load .*theirs .'metadata'.\\."):
        import_model(folder, tmp_path / "ours")
    assert not list(tmp_path.iterdir())


def test_separators_need_a_tokenizer(models: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(models("llama") / "theirs", tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="needs to know which tokens are separators"):
        import_model(tmp_path / "theirs", tmp_path / "ours", attention=["pattern=sep"])
    import_model(tmp_path / "theirs", tmp_path / "ours", attention=["pattern=streaming", "window=8"])
    with pytest.raises(UserError, match="was imported from a model without a tokenizer: give its file"):
        in_memory(open_run(tmp_path / "ours"))

"""sepllm stream: kills, damaged files, foreign models, ends of contexts: one sentence each, and nothing lost."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")


from sepllm_train.evaluation import stream_score as score_module
from sepllm_train.evaluation.stream_model import make_cache, open_model
from sepllm_train.evaluation.stream_score import perplexity
from sepllm_train.evaluation.stream_state import load_state, save_state
from sepllm_train.generation.choice import AttentionChoice
from sepllm_train.hf import cache_argument
from tests.support import command as commands

main = commands.command("stream")

pytestmark = pytest.mark.filterwarnings("error:.*past_key_values.*:FutureWarning")

SIZES = ["--initial", "3", "--separators", "5", "--window", "6", "--capacity", "24"]


def command(model: Path, text: Path, output: Path, *options: str) -> list[str]:
    sizes = [] if "--cache" in options else SIZES
    common = ["--chunk", "16", "--every", "64", "--tokens", "128"]
    return ["score", str(model), "--text", str(text), "--output", str(output), *sizes, *common, *options]


def sentence(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The sentence with which a command ends."""
    capsys.readouterr()
    assert main(arguments) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and told[0].endswith(".")
    return told[0]


def test_two_kills_leave_a_state(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first between the two renames, the second while the next state is written."""
    opened = open_model(str(model_folder), None, "fp32", "cpu")

    def cache() -> Any:
        return make_cache(opened, AttentionChoice("streaming", initial=3, window=6))

    filled = cache()
    with torch.inference_mode():
        opened.model(torch.arange(9)[None], **{cache_argument(opened.model): filled})
    save_state(tmp_path, filled, {"at": 1})
    (tmp_path / "state").rename(tmp_path / "state.removed.partial")
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_state(tmp_path, filled, {"at": 2})
    found = load_state(tmp_path, cache())
    assert found is not None and found["at"] == 1


@pytest.mark.parametrize("damage", ["short", "garbled", "none said"])
def test_damaged_tokens_are_made_again(
    model_folder: Path, text_file: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command(model_folder, text_file, tmp_path / "whole")) == 0
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())
    output = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(score_module, "_nats", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(command(model_folder, text_file, output))
    if damage == "short":
        os.truncate(output / "tokens.bin", 100)
    else:
        (output / "tokens.json").write_text("{" if damage == "garbled" else "{}")
    assert main(command(model_folder, text_file, output)) == 0
    assert json.loads((output / "result.json").read_text())["loss"] == whole["loss"]


def test_fingerprint(model_folder: Path) -> None:
    """Of the weights and of what they compute; not of the version that wrote them."""
    opened = open_model(str(model_folder), None, "fp32", "cpu")
    first = opened.fingerprint()
    opened.model.config.transformers_version = "99.0"
    assert opened.fingerprint() == first
    pattern = opened.model.config.sepllm_attention
    opened.model.config.sepllm_attention = {**pattern, "initial_tokens": 99}
    assert opened.fingerprint() != first
    opened.model.config.sepllm_attention = pattern
    with torch.no_grad():
        next(opened.model.parameters()).flatten()[0] += 1
    assert opened.fingerprint() != first


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model to be damaged."""
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def reconfigure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--cache", "full"], "give --tokens N of at most 100, or --positions absolute"),
        (["--cache", "pattern"], "give --tokens N of at most 100, or --cache sep"),
        (["--positions", "training"], "give --tokens N of at most 100, or --positions cache"),
        (["--cache", "full", "--repeat"], "give --tokens N of at most 100, or --positions absolute"),
    ],
)
def test_the_end_of_the_context(
    copied: Path, text_file: Path, tmp_path: Path, options: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reconfigure(copied, max_position_embeddings=100)
    told = sentence(capsys, command(copied, text_file, tmp_path / "out", *options))
    assert "128 tokens pass the model's context of 100" in told and advice in told
    assert main(command(copied, text_file, tmp_path / "out", *options, "--tokens", "100")) == 0


def test_chat_at_the_end_of_the_context(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reconfigure(copied, max_position_embeddings=40)
    monkeypatch.setattr(sys, "stdin", ["the cat\n"] * 9)
    told = sentence(capsys, ["chat", str(copied), "--cache", "full", "--tokens", "9"])
    assert "pass the model's context of 40" in told and "--positions absolute" in told


def _cut(name: str) -> Callable[[Path], Any]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def _without(folder: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (_cut("model.safetensors"), "deserializing header"),
        (_cut("config.json"), "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "model.safetensors"),
        (lambda folder: _without(folder, "embed_out.weight"), ".weight"),
        (lambda folder: (folder / "config.json").write_text("[]"), ""),
        (lambda folder: reconfigure(folder, model_type="nothing"), "nothing"),
        (lambda folder: reconfigure(folder, num_hidden_layers="two"), "num_hidden_layers"),
        (lambda folder: reconfigure(folder, hidden_size=16), ""),
        (lambda folder: reconfigure(folder, sepllm_attention={"format": 99}), ""),
        (lambda folder: reconfigure(folder, sepllm_attention=[1]), ""),
    ],
)
def test_damaged_models(
    copied: Path, text_file: Path, tmp_path: Path, damage: Callable[[Path], Any], cause: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damage(copied)
    told = sentence(capsys, command(copied, text_file, tmp_path / "out"))
    assert f"the model in {copied} cannot be loaded (" in told and cause in told


@pytest.mark.parametrize("place", ["file", "file/below/it"])
def test_output_that_is_a_file(
    model_folder: Path, text_file: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    told = sentence(capsys, command(tmp_path / "no model", text_file, tmp_path / place))
    assert f"{tmp_path / 'file'} is not a folder; choose another --output" in told


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "7", '{"cache": "sep", "points": [1]}'])
def test_foreign_results(
    model_folder: Path, text_file: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "result.json").write_text(content)
    for arguments in (["report", str(tmp_path)], command(model_folder, text_file, tmp_path)):
        assert f"{tmp_path / 'result.json'} " in sentence(capsys, arguments)


def test_logits_that_are_not_finite(
    copied: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    # A number each, and too much together.
    tensors["gpt_neox.final_layer_norm.bias"][:] = 3e38
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    told = sentence(capsys, command(copied, text_file, tmp_path / "out"))
    assert "the model's logits are not finite" in told
    assert not (tmp_path / "out" / "result.json").exists()
    assert math.isnan(perplexity(math.nan, 3)) and perplexity(1e9, 1) == math.inf and perplexity(0.0, 3) == 1


@pytest.mark.slow
def test_chat_with_foreign_bytes_and_nobody_listening(repository: Path, model_folder: Path) -> None:
    arguments = [
        sys.executable,
        "-m",
        "sepllm_train",
        "stream",
        "chat",
        str(model_folder),
        *SIZES,
        "--tokens",
        "5",
    ]
    options: dict[str, Any] = {"cwd": repository, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    done = subprocess.run(arguments, input=b"caf\xe9 and \xff\n", capture_output=True, **options)
    assert done.returncode == 0 and b"in the cache]" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(arguments, input=b"the cat\n", stdout=writer, stderr=subprocess.PIPE, **options)
    os.close(writer)
    assert done.returncode == 141 and b"BrokenPipe" not in done.stderr and b"Traceback" not in done.stderr

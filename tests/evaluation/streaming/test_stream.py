"""sepllm stream: perplexity against a plain computation, stops and continuations, tables, mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")


from data_prep.tokenizers import load_tokenizer
from sepllm_train.hf import load_model
from tests.hf.tiny_models import Oracle
from tests.support.command import command
from tests.support.waiting import HANG_SECONDS, wait_until

main = command("stream")

pytestmark = pytest.mark.filterwarnings("error:.*past_key_values.*:FutureWarning")

SIZES = ["--initial", "3", "--separators", "5", "--window", "6", "--capacity", "24"]


def score(model: Path, text: Path, output: Path, *options: str) -> dict[str, Any]:
    assert main(["score", str(model), "--text", str(text), "--output", str(output), *options]) == 0
    return json.loads((output / "result.json").read_text())


@pytest.mark.parametrize("chunk", ["1", "64"])
def test_perplexity_is_the_oracles(model_folder: Path, text_file: Path, tmp_path: Path, chunk: str) -> None:
    result = score(model_folder, text_file, tmp_path, *SIZES, "--tokens", "300", "--chunk", chunk, "--every", "64")
    tokenizer = load_tokenizer(model_folder / "tokenizer.json")
    ids = torch.tensor(tokenizer.encode_batch([text_file.read_text()])[0][:300])
    with torch.no_grad():
        oracle = Oracle(load_model(str(model_folder), dense=True), 3, 5, 6, 24)
        oracle.separators = set(tokenizer_separators(model_folder))
        logits = oracle.run(ids)[:-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[1:])
    assert result["loss"] == pytest.approx(float(loss), abs=1e-5)
    assert result["mean_length"] == pytest.approx(sum(oracle.lengths) / 300)
    assert [point["tokens"] for point in result["points"]] == [64, 128, 192, 256, 300]
    assert result["differences"] == [] and result["tokens"] == 300


def tokenizer_separators(folder: Path) -> list[int]:
    from sepllm_train.generation.pattern import separator_ids

    return separator_ids(load_tokenizer(folder / "tokenizer.json"))


@pytest.mark.parametrize("cache", [["pattern"], ["full"], ["streaming"], ["fixed", "--interval", "4"], ["sep"]])
def test_a_killed_stream_continues_to_the_same_result(
    model_folder: Path, text_file: Path, tmp_path: Path, cache: list[str]
) -> None:
    """Stopped in the middle of a chunk, by Ctrl-C and by SIGTERM; the state of every cache comes back bit by bit."""
    from sepllm_train.evaluation import stream_score as module

    sizes = {"pattern": [], "full": [], "streaming": [*SIZES[:2], *SIZES[4:6]]}.get(cache[0], SIZES)
    options = [*sizes, "--cache", *cache]
    options += ["--chunk", "16", "--every", "64", "--tokens", "400"]
    whole = score(model_folder, text_file, tmp_path / "whole", *options)
    stops = iter((5, 12))
    real, calls = module._nats, [0, next(stops)]

    def stopping(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == calls[1]:
            calls[1] = next(stops, -1)
            os.kill(os.getpid(), signal.SIGINT if calls[1] > 0 else signal.SIGTERM)
        return real(*arguments)

    module._nats = stopping  # type: ignore[assignment]
    try:
        command = ["score", str(model_folder), "--text", str(text_file), "--output", str(tmp_path / "cut"), *options]
        assert [main(command), main(command), main(command)] == [130, 130, 0]
    finally:
        module._nats = real
    cut = json.loads((tmp_path / "cut" / "result.json").read_text())
    for key in ("loss", "tokens", "mean_length"):
        assert cut[key] == whole[key], key
    assert [p["loss"] for p in cut["points"]] == [p["loss"] for p in whole["points"]]


def test_sigterm_saves(repository: Path, model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sepllm_train", "stream", "score", str(model_folder), "--text", str(text_file)]
    command += ["--repeat", "--output", str(tmp_path), *SIZES, "--chunk", "64", "--every", "64", "--save-every", "0.2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=repository, env=environment, stdout=subprocess.PIPE, text=True)
    wait_until((tmp_path / "state").is_dir, "a saved state", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130 and "the same command continues" in output
    assert json.loads((tmp_path / "state" / "progress.json").read_text())["progress"]["tokens"] % 64 == 0


def test_report(model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--tokens", "256", "--chunk", "64", "--every", "128"]
    sep = score(model_folder, text_file, tmp_path / "sep", *SIZES, *common)
    rolling = ["--cache", "streaming", "--initial", "2", "--window", "9"]
    streaming = score(model_folder, text_file, tmp_path / "streaming", *rolling, *common)
    capsys.readouterr()
    assert main(["report", str(tmp_path / "sep"), str(tmp_path / "streaming"), "--at", "128,256"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("| cache | a | s | w | c | positions | ppl at 128 | ppl at 256 | mean keys |")
    assert f"| {sep['perplexity']:.2f} | {sep['mean_length']:.1f} |" in table[2]
    assert table[3].startswith("| StreamingLLM | 2 |  | 9 |") and f"{streaming['perplexity']:.2f}" in table[3]
    assert main(["report", str(tmp_path)]) == 2


def test_finished_streams_and_others(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SIZES, "--tokens", "128", "--chunk", "64", "--every", "64"]
    first = score(model_folder, text_file, tmp_path, *options)
    assert score(model_folder, text_file, tmp_path, *options) == first
    assert "is finished" in capsys.readouterr().out
    command = ["score", str(model_folder), "--text", str(text_file), "--output", str(tmp_path), *options]
    assert main([*command, "--window", "7"]) == 2
    assert "holds a stream with window=6, this one has 7: choose another --output" in capsys.readouterr().err


def test_chat_remembers(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def talk(*lines: str) -> tuple[list[str], str]:
        monkeypatch.setattr(sys, "stdin", [line + "\n" for line in lines])
        assert main(["chat", str(model_folder), *SIZES, "--tokens", "20"]) == 0
        found = capsys.readouterr()
        return found.out.split("\n"), found.err

    one, told = talk("the cat", "", "a dog")
    two, _ = talk("the cat")
    assert one[0] == two[0] and len(one) >= 3
    assert told.count("in the cache]") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--capacity", "14"], "initial=3 + separators=5 + window=6 is 14, and capacity=14 must be larger"),
        (["--cache", "fixed"], "fixed needs --interval D"),
        (["--tokens", "1"], "--tokens=1 must be at least 2"),
        (["--chunk", "48"], "--every=64 must be a multiple of --chunk=48"),
        (["--window", "7", "--strict"], "strict=True, and the cache is not what the model was trained with"),
        (["--text", "nowhere.txt"], "There is no file nowhere.txt"),
        (["--tokenizer", "nowhere.json"], "Cannot read the tokenizer nowhere.json"),
        (["--classes", "paper,dots"], "Unknown separator class 'dots'"),
        (["--device", "cuda"], "there is no GPU here"),
        (["--capacity", "9000"], "capacity=9000 is above the model's context of 4096 positions"),
        (["--device", "foo"], "--device foo is unknown: use cpu, cuda or cuda:N"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
    ],
)
def test_mistakes(
    model_folder: Path, text_file: Path, tmp_path: Path, options: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    command = ["score", str(model_folder), "--text", str(text_file), "--output", str(tmp_path / "out"), *SIZES]
    assert main([*command, "--every", "64", "--chunk", "64", *options]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and message in told[0]
    assert not (tmp_path / "out").exists()


def test_what_is_no_model(tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(tmp_path), "--text", str(text_file), "--output", str(tmp_path / "out")]) == 2
    assert "is neither a run (config.yaml) nor a transformers model (config.json)" in capsys.readouterr().err


def test_the_text_is_checked_before_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("A page.")
    output = ["--output", str(tmp_path / "out")]
    for text, words in ((page, f"{page} is neither .txt nor .jsonl"), (tmp_path / "none.txt", "There is no file ")):
        assert main(["score", str(tmp_path / "no_model"), "--text", str(text), *output]) == 2
        assert words in capsys.readouterr().err

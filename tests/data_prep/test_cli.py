"""The command line: help, results, and one sentence with exit code 2 for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.tokenizers import load_tokenizer
from tests.support.command import command

main = command("prepare")

COMMANDS = ["tokenize", "annotate", "train-tokenizer", "stats", "verify"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  sepllm prepare {command} " in capsys.readouterr().out


def test_from_text_to_statistics(tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    book, model, prefix = str(tmp_path / "book.txt"), str(tmp_path / "book.model"), str(tmp_path / "set")
    Path(book).write_text("".join(texts), encoding="utf8")
    assert main(["train-tokenizer", book, "--vocab-size", "500", "--output", model]) == 0
    assert load_tokenizer(model).vocab_size == 500
    assert main(["tokenize", book, "--tokenizer", model, "--output", prefix]) == 0
    assert "tokens in 1 documents" in capsys.readouterr().out
    for suffix in (".sep.bin", ".sep.json"):
        Path(f"{prefix}{suffix}").unlink()
    assert main(["annotate", prefix, "--tokenizer", model]) == 0
    assert main(["verify", prefix, "--tokenizer", model]) == 0
    assert "1 documents are as their header says" in capsys.readouterr().out
    assert main(["stats", prefix, "--separators", "all", "--length", "128"]) == 0
    table = capsys.readouterr().out
    assert "* period " in table and "(a=3, n=64, S=128)" in table
    assert main(["stats", prefix, "--json", "--window", "9"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["documents"] == 1 and result["visible"]["window"] == 9 and 0 < result["density"] < 1


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".sep.bin", ".sep.json"])
def test_a_dataset_may_be_named_by_one_of_its_files(dataset: Path, small_tokenizer: Path, suffix: str) -> None:
    """As training takes it: shells complete file names."""
    name = f"{dataset}{suffix}"
    assert main(["stats", name, "--length", "128"]) == 0
    assert main(["verify", name]) == 0
    assert main(["annotate", name, "--tokenizer", str(small_tokenizer), "--overwrite"]) == 0
    corpus = dataset.parent / "text.txt"
    corpus.write_text("some text")
    output = f"{dataset.parent / 'new'}{suffix}"
    assert main(["tokenize", str(corpus), "--tokenizer", str(small_tokenizer), "--output", output]) == 0
    assert main(["verify", str(dataset.parent / "new")]) == 0


def test_skipped_documents_are_named_and_counted(
    tmp_path: Path, small_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "good.txt").write_text("coffee")
    command = ["tokenize", str(tmp_path / "bad.txt"), str(tmp_path / "good.txt")]
    command += ["--tokenizer", str(small_tokenizer), "--output", str(tmp_path / "set")]
    assert main(command) == 0
    output = capsys.readouterr()
    assert f"skipped {tmp_path}/bad.txt: not UTF-8 (byte 3)" in output.err
    assert "skipped 1 documents that are not UTF-8 and 0 without text" in output.out
    assert main([*command, "--strict", "--overwrite"]) == 2
    assert (
        capsys.readouterr().err == f"error: {tmp_path}/bad.txt is not UTF-8 (byte 3): convert it, or leave --strict.\n"
    )


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("tokenize {corpus} --field body --tokenizer {tokenizer} --output {new}", ":1 has no text field 'body'"),
        ("tokenize {corpus} --tokenizer {tokenizer} --output {set}", "set.bin exists already"),
        ("tokenize {tmp}/none.txt --tokenizer {tokenizer} --output {new}", "There is no file"),
        ("tokenize {tokenizer} --tokenizer {tokenizer} --output {new}", "is neither .txt nor .jsonl"),
        ("tokenize {corpus} --tokenizer {corpus} --output {new}", "is not a SentencePiece model"),
        ("tokenize {corpus} --tokenizer {tokenizer} --output {corpus}/new", "Cannot make the folder"),
        ("annotate {new} --tokenizer {tokenizer}", "new.bin is missing"),
        ("annotate {set} --tokenizer {tokenizer}", "set.sep.bin exists already"),
        ("stats {new}", "There is no dataset at"),
        ("stats {set} --window 0", "window=0"),
        ("stats {set} --separators periods", "Unknown separator class 'periods'"),
        ("stats {set} --length 99999999", "longer than the data"),
        ("verify {new}", "There is no dataset at"),
        ("train-tokenizer {corpus} --vocab-size 99 --output {new}", "A vocabulary of 99 is too small"),
        ("train-tokenizer {corpus} --vocab-size 99999 --output {new}", "No vocabulary of 99999 can be made"),
        ("train-tokenizer {corpus} --vocab-size 500 --output {tokenizer}", "exists already"),
        ("train-tokenizer {tmp}/empty.jsonl --vocab-size 500 --output {new}", "The corpus is empty"),
    ],
)
def test_mistakes(
    command: str,
    sentence: str,
    dataset: Path,
    corpus: Path,
    small_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.jsonl").touch()
    places = {"corpus": corpus, "tokenizer": small_tokenizer, "set": dataset, "new": tmp_path / "new", "tmp": tmp_path}
    capsys.readouterr()
    assert main([part.format(**places) for part in command.split()]) == 2
    output = capsys.readouterr()
    assert sentence in output.err and output.err.count("\n") == 1 and output.out == ""
    assert not list(tmp_path.glob("new*"))


def test_the_command_itself(dataset: Path) -> None:
    command = [sys.executable, "-m", "sepllm_train", "prepare", "verify"]
    fine = subprocess.run([*command, str(dataset)], capture_output=True, text=True)
    assert (fine.returncode, fine.stderr) == (0, "")
    Path(f"{dataset}.idx").unlink()
    failed = subprocess.run([*command, str(dataset)], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith(f"error: {dataset}.idx is missing: ")
    assert failed.stderr.count("\n") == 1

"""sepllm analyze on a trained run: what it writes, and one sentence for a mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from sepllm_train.distributed.launch import alone
from tests.analysis.conftest import Trained
from tests.support.command import command

prepare = command("prepare")

main = command("analyze")


@pytest.fixture(scope="module")
def other_tokenizer(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a dataset with a vocabulary that no run here was trained on."""
    folder = tmp_path_factory.mktemp("other")
    pages = [str(path) for path in sorted((repository / "docs").glob("*.md"))]
    lines = "".join(json.dumps({"text": Path(page).read_text(encoding="utf8")}) + "\n" for page in pages)
    (folder / "pages.jsonl").write_text(lines)
    source = str(folder / "pages.jsonl")
    model = str(folder / "small.model")
    assert prepare(["train-tokenizer", source, "--vocab-size", "500", "--output", model]) == 0
    assert prepare(["tokenize", source, "--tokenizer", model, "--output", str(folder / "pages")]) == 0
    return folder / "pages"


def test_loss_command(trained: Trained, tmp_path: Path) -> None:
    output = tmp_path / "loss"
    options = ["--drop-classes", "--windows", "4,16", "--lengths", "64,128", "--far-recall", "--samples", "3"]
    assert main(["loss", str(trained.folder), *options, "--output", str(output)]) == 0
    result = json.loads((output / "loss.json").read_text())
    assert result["samples"] == 3 and result["checkpoint"]["step"] == 4
    assert result["environment"]["packages"]["torch"] and result["environment"]["command"]
    assert [row["class"] for row in result["classes"]] == ["period", "comma", "newline", "all of them"]
    assert [(row["length"], row["window"]) for row in result["sweep"]] == [(64, 4), (64, 16), (128, 4), (128, 16)]
    rows = {(row["pattern"], row["tokens"]): row for row in result["far_recall"]}
    far, other = (rows["as trained", name] for name in ("far recall", "other"))
    mean = far["share"] * far["loss"]["mean"] + other["share"] * other["loss"]["mean"]
    assert mean == pytest.approx(result["patterns"][0]["loss"]["mean"], rel=1e-9)
    lengths = [row["last"] - row["first"] + 1 for row in result["positions"]]
    assert sum(lengths) == 128
    total = sum(n * row["trained"]["mean"] for n, row in zip(lengths, result["positions"], strict=True))
    assert total / 128 == pytest.approx(result["patterns"][0]["loss"]["mean"], rel=1e-9)
    markdown = (output / "loss.md").read_text()
    for row in result["classes"]:
        assert f"{row['change']['mean']:+.4f} ± {row['change']['error']:.4f}" in markdown
    names = {"loss_by_position", "loss_without_class", "loss_per_removed_pair", "loss_vs_pairs", "far_recall"}
    files = {f"{name}.svg" for name in names} | {"loss.json", "loss.md"}
    assert {path.name for path in output.iterdir()} == files


def test_longer_sequences_than_in_training_are_told(trained: Trained, tmp_path: Path) -> None:
    output = tmp_path / "loss"
    assert main(["loss", str(trained.folder), "--lengths", "256,128", "--samples", "4", "--output", str(output)]) == 0
    result = json.loads((output / "loss.json").read_text())
    assert [row["length"] for row in result["sweep"]] == [128, 256] and result["classes"] == []
    assert "trained on sequences of 128 tokens" in (output / "loss.md").read_text()


def test_pattern_to_vary_can_be_another(trained: Trained, tmp_path: Path) -> None:
    output = tmp_path / "loss"
    overrides = ["--attention", "separators=all", "window=32"]
    assert main(["loss", str(trained.folder), *overrides, "--samples", "2", "--output", str(output)]) == 0
    result = json.loads((output / "loss.json").read_text())
    own, base = result["patterns"]
    assert base["attended_share"] > own["attended_share"] and base["change"]["mean"] != 0 == own["change"]["mean"]


def test_attention_command(trained: Trained, tmp_path: Path) -> None:
    output = tmp_path / "attention"
    options = ["--samples", "2", "--layers", "1", "--heads", "0,3"]
    assert main(["attention", str(trained.folder), *options, "--output", str(output)]) == 0
    result = json.loads((output / "attention.json").read_text())
    assert result["separators_chosen"] == ["period", "comma", "newline"]
    assert (result["window"], result["initial"], result["layers"], result["heads"]) == (16, 3, [1], [0, 3])
    assert sum(group["mass"]["mean"] for group in result["groups"].values()) == pytest.approx(1, abs=1e-6)
    # What the pattern hides gets nothing, and beyond the window it shows separators alone.
    assert result["groups"]["others far"]["mass"]["mean"] == 0 < result["groups"]["separators far"]["mass"]["mean"]
    assert len(result["head_mass"]) == 1 and len(result["head_mass"][0]) == 2
    pair = result["separators"]
    assert pair["lift"] == pytest.approx(pair["mass"]["mean"] / pair["uniform"])
    markdown = (output / "attention.md").read_text()
    assert f"Separators receive {pair['mass']['mean']:.1%} of the attention" in markdown
    assert (output / "separator_mass.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("loss", ["--windows", "16,0"], "--windows 0: a window counts the token itself"),
        ("loss", ["--lengths", "100,128"], "--lengths 100 does not divide 128"),
        ("loss", ["--samples", "0"], "--samples 0 must be at least 1"),
        ("loss", ["--checkpoint", "3"], "has no checkpoint of step 3: there are 2, 4"),
        ("loss", ["--held-out", "0.5"], "would include documents that"),
        ("loss", ["--data", "nowhere/text"], "There is no dataset at "),
        ("loss", ["--attention", "separators=[dot]"], "unknown separator class 'dot'"),
        ("loss", ["--attention", "sink=learned"], "--attention sink=learned: write KEY=VALUE with one of pattern"),
        ("loss", ["--attention", "window=0"], "attention.window=0 must be whole numbers of at least 1"),
        ("loss", ["--drop-classes", "--attention", "pattern=streaming"], "the pattern keeps no separator that occurs"),
        ("attention", ["--layers", "2"], "--layers 2: this model has layers 0 to 1"),
        ("attention", ["--heads", "0,-1"], "--heads -1: this model has heads 0 to 3"),
        ("attention", ["--classes", "period,stop"], "Unknown separator class 'stop'"),
        ("attention", ["--window", "0"], "--window 0 must be at least 1"),
    ],
)
def test_mistake(trained: Trained, command: str, options: list[str], words: str, tmp_path: Path, capsys: Any) -> None:
    refused([command, str(trained.folder), *options, "--output", str(tmp_path / "out")], words, capsys)
    assert not (tmp_path / "out").exists()
    assert not dist.is_initialized()


def refused(arguments: list[str], words: str, capsys: Any) -> None:
    """The command ends with code 2 and one sentence that has these words."""
    assert main(arguments) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("error: ") and words in sentence


def test_run_without_a_checkpoint(trained: Trained, tmp_path: Path, capsys: Any) -> None:
    output = ["--output", str(tmp_path / "out")]
    refused(["loss", str(tmp_path), *output], "config.yaml does not exist: give the folder of a run", capsys)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(trained.folder / "config.yaml", bare)
    refused(["loss", str(bare), *output], f"{bare} has no whole checkpoint", capsys)
    shutil.copytree(trained.folder, tmp_path / "damaged")
    for step in ("step_00000002", "step_00000004"):
        shard = tmp_path / "damaged" / "checkpoints" / step / "__0_0.distcp"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    refused(["attention", str(tmp_path / "damaged"), *output], "is damaged, the content of", capsys)
    (bare / "config.yaml").write_text("model: {depth: 3}\n")
    refused(["loss", str(bare), *output], f"{bare / 'config.yaml'}: ", capsys)
    (bare / "config.yaml").write_text("model: {depth: 3\n")
    refused(["loss", str(bare), *output], f"{bare / 'config.yaml'} is not YAML (line 2: expected", capsys)
    assert not (tmp_path / "out").exists()


def test_data_of_another_vocabulary(trained: Trained, other_tokenizer: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["loss", str(trained.folder), "--data", str(other_tokenizer), "--output", str(tmp_path / "out")]
    refused(arguments, "was trained on another vocabulary", capsys)


def test_output_that_cannot_be_written(trained: Trained, sample_prefix: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(["loss", str(trained.folder), "--output", str(output)], "--output", capsys)
        refused(["corpus", str(sample_prefix), "--output", str(output)], "--output", capsys)


def test_text_that_cannot_be_read(sample_prefix: Path, tmp_path: Path, capsys: Any) -> None:
    output = ["--output", str(tmp_path / "out")]
    (tmp_path / "book.txt").write_text("A text.")
    refused(["corpus", str(tmp_path / "book.txt"), *output], "name the tokenizer to read it with", capsys)
    refused(["corpus", str(tmp_path / "none"), *output], "There is no dataset at", capsys)
    refused(["corpus", str(sample_prefix), str(sample_prefix), *output], "was given twice", capsys)
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with alone():
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        with pytest.raises(Exception, match="an analysis runs in one process"), alone():
            pass
        monkeypatch.undo()

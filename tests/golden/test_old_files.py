"""Files that b31b21f wrote are read by this tree. They stay: a tree that cannot read them is wrong.

`run` was written with Python 3.11, torch 2.13 and megatron-core 0.16.1; `run_megatron_core_0.19` is the same run,
written later with Python 3.13, torch 2.15 and megatron-core 0.19.2. Every supported environment reads both.

Hashes are of stored bytes; what is computed from them is compared with a tolerance, since bits differ between machines.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorProperties

from tests.golden.archives import FILES
from tests.golden.make_files import STORED_RUN
from tests.golden.side import Tree
from tests.golden.sides import REPOSITORY

RUNS = ("run", "run_megatron_core_0.19")
EXPECTED: dict[str, Any] = json.loads((FILES / "expected.json").read_text())


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tree]:
    """This tree; its programs run in an empty folder, with one thread."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEPLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["pytest"])
    torch.set_num_threads(1)
    yield Tree.at(REPOSITORY)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("run", RUNS)
def test_the_checkpoint_holds_what_was_stored(tree: Tree, golden_files: Path, run: str) -> None:
    stored, found = EXPECTED["checkpoint"], dict(tree.get("digests")(golden_files / run))
    other = sorted(key for key in stored.keys() | found if stored.get(key) != found.get(key))
    assert not other, f"read otherwise than stored: {other}"


@pytest.mark.parametrize("run", RUNS)
def test_a_run_resumes_from_the_checkpoint_and_writes_the_same_keys(
    tree: Tree, golden_files: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step. The keys of a checkpoint are pinned: users' checkpoints have exactly these."""
    data = ("data=prefixes", f"data.prefixes=['{golden_files / 'data' / 'guide'}']")
    tree.run("pretrain", *STORED_RUN, *data, "name=again", f"resume={golden_files / run}", "training.steps=5")
    records = [json.loads(line) for line in Path("runs/again/metrics.jsonl").read_text().splitlines()]
    (loss,) = (record["train/loss"] for record in records if "train/loss" in record)
    assert loss == pytest.approx(EXPECTED["loss of step 5"], rel=1e-5)
    written = {name for name, _ in tree.get("digests")(Path("runs/again"))}
    gone, new = sorted(EXPECTED["checkpoint"].keys() - written), sorted(written - EXPECTED["checkpoint"].keys())
    assert (gone, new) == ([], []), f"keys of a checkpoint that are gone: {gone}, and new ones: {new}"
    properties: list[int] = []
    monkeypatch.setattr(TensorProperties, "__setstate__", lambda _, state: properties.append(len(state)))
    pickle.loads(Path("runs/again/checkpoints/step_00000005/.metadata").read_bytes())
    assert set(properties) == {5}, "torch 2.13 reads no more properties of a tensor than five"


@pytest.mark.parametrize("name", ["guide", "notes"])
def test_the_side_car_verifies(tree: Tree, golden_files: Path, name: str) -> None:
    assert "are as their header says" in tree.run("prepare_data", "verify", str(golden_files / "data" / name))


def test_the_run_is_exported_to_the_stored_weights(tree: Tree, golden_files: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = golden_files / "data" / "guide.tokenizer.model"
    tree.run("export", str(golden_files / "run"), "export", "--tokenizer", str(tokenizer))
    folders = (Path("export"), golden_files / "export")
    made, stored = (safetensors.load_file(folder / "model.safetensors") for folder in folders)
    assert made.keys() == stored.keys()
    assert all(torch.equal(made[name], stored[name]) for name in stored)


def test_the_export_computes_the_stored_logits(tree: Tree, golden_files: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = tree.get("load_model")(golden_files / "export")
    with torch.no_grad():
        logits = model(torch.tensor([EXPECTED["ids"]])).logits[0]
    torch.testing.assert_close(logits[::4, ::40], torch.tensor(EXPECTED["logits"]), rtol=0, atol=1e-5)


def test_the_suite_is_reported_again(tree: Tree, golden_files: Path) -> None:
    shutil.copytree(golden_files / "suite", "suites")
    stored = json.loads(Path("suites/paper-toy/report/report.json").read_text())["128"]
    shutil.rmtree("suites/paper-toy/report")
    tree.run("suite", "+suite=paper", "suite.size=toy", "suite.do=[report]")
    made = json.loads(Path("suites/paper-toy/report/report.json").read_text())["128"]
    assert [row["label"] for row in made["rows"]] == [row["label"] for row in stored["rows"]] == ["dense", "sep"]
    for old, new in zip(stored["rows"], made["rows"], strict=True):
        assert new["final_loss"] == pytest.approx(old["final_loss"], rel=1e-9)
        assert [run["name"] for run in new["runs"]] == [run["name"] for run in old["runs"]]

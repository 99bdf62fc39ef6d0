"""`sepllm average`: the mean of checkpoints is exact, opens like any run, and is there whole or not at all."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sepllm_train.base.errors import UserError
from sepllm_train.base.files import hash_file
from sepllm_train.runs.average import average_checkpoints
from sepllm_train.runs.evaluate import evaluate_run
from sepllm_train.runs.open import find_checkpoint, open_run
from sepllm_train.training.checkpoint import digest
from sepllm_train.training.checkpoint.load import whole_tensors
from tests.support.command import command
from tests.support.distributed_runner import run_ranks
from tests.support.waiting import HANG_SECONDS
from tests.training.resume_worker import train_all, train_alone

# More than the sample's tokenizer has, and padded to other lengths by one and by two tensor-parallel ranks.
GATED = {
    "model": {"activation": "swiglu", "kv_heads": 2, "tied_embeddings": True, "vocabulary": 4100},
    "attention": {"sink": "learned", "qk_norm": True},
}
RUNS: dict[str, dict[str, dict[str, Any]]] = {"gated": GATED, "bf16": {"training": {"precision": "bf16"}}}


@pytest.fixture(scope="module")
def runs(sample_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Trains each run of RUNS once: three steps with a checkpoint after each."""
    root = tmp_path_factory.mktemp("runs")

    def trained(name: str) -> Path:
        return root / name if (root / name).exists() else train_alone(root, sample_cache, name, **RUNS[name])

    return trained


def tensors(folder: Path, step: int | None = None) -> dict[str, Tensor]:
    """Weights and the optimizer's tensors of a checkpoint."""
    found = whole_tensors(find_checkpoint(folder, step))
    return {name: tensor for name, tensor in found if not name.startswith("rng.")}


def weights(folder: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a checkpoint, and each in its highest precision."""
    found = tensors(folder, step)
    own = {name: tensor for name, tensor in found.items() if not name.startswith("optimizer.")}
    return own, {name: found.get(f"optimizer.state.fp32_param.{name}", tensor) for name, tensor in own.items()}


@pytest.mark.parametrize("name", RUNS)
def test_the_mean_is_of_the_finest_copies_rounded_once(runs: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    average_checkpoints(runs(name), [3, 1], tmp_path / "mean")
    (one, fine), (other, also_fine) = (weights(runs(name), step) for step in (1, 3))
    found = tensors(tmp_path / "mean")
    assert found.keys() == one.keys(), "weights and nothing else"
    for key, tensor in found.items():
        mean = ((fine[key].double() + also_fine[key].double()) / 2).float()
        assert tensor.dtype == one[key].dtype and torch.equal(tensor, mean.to(tensor.dtype)), key
    assert any(not torch.equal(found[key], one[key]) for key in found)
    if name == "bf16":
        assert {tensor.dtype for tensor in fine.values()} == {torch.float32}
        rounded = {key: ((one[key].double() + other[key].double()) / 2).bfloat16() for key in found}
        assert any(not torch.equal(found[key], rounded[key]) for key in found), "of the rounded weights"


@pytest.mark.parametrize("name", RUNS)
def test_the_mean_of_one_has_its_weights(runs: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    average_checkpoints(runs(name), [2], tmp_path / "mean")
    own, _ = weights(runs(name), 2)
    found = tensors(tmp_path / "mean")
    assert all(torch.equal(found[key], own[key]) for key in own)


def test_it_opens_like_the_run(runs: Callable[[str], Path], tmp_path: Path) -> None:
    source = runs("gated")
    for name in ("mean", "again"):
        average_checkpoints(source, [1, 2, 3], tmp_path / name)
    run, last = open_run(tmp_path / "mean"), open_run(source)
    assert run.config == replace(last.config, name="mean", run_root=str(tmp_path))
    assert (run.checkpoint.step, run.checkpoint.tokens) == (3, last.checkpoint.tokens)
    assert run.checkpoint.identity == last.checkpoint.identity
    written = json.loads((tmp_path / "mean" / "run.json").read_text())
    assert written["status"] == "averaged" and written["averaged_from"] == {
        "run": str(source),
        "checkpoints": [open_run(source, step).checkpoint.record() for step in (1, 2, 3)],
    }
    assert sorted(path.name for path in (tmp_path / "mean").iterdir()) == ["checkpoints", "config.yaml", "run.json"]
    assert evaluate_run(run, 2)["loss"] == pytest.approx(evaluate_run(last, 2)["loss"], abs=0.1)
    assert digest(tmp_path / "mean") == digest(tmp_path / "again")


def test_commands_take_it(runs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mean = tmp_path / "mean"
    assert command("average")([runs("bf16"), mean, "--last", 2]) == 0
    line = f"{mean}: mean of 2 checkpoints of {runs('bf16')} (steps 2, 3) as step 3 in bf16\n"
    assert capsys.readouterr().out.endswith(line)
    assert command("generate")([mean, "--prompt", "def", "--tokens", 2]) == 0
    assert command("analyze loss")([mean, "--samples", 1, "--output", tmp_path / "loss"]) == 0
    capsys.readouterr()
    assert command("average")([runs("bf16"), mean, "--steps", "1,2"]) == 2
    assert capsys.readouterr().err == f"error: {mean} exists already: choose another name.\n"


def test_it_is_exported(runs: Callable[[str], Path], tmp_path: Path) -> None:
    """With the logits of the run, which the export compares."""
    pytest.importorskip("transformers", reason="transformers is an optional package: extra hf")
    average_checkpoints(runs("bf16"), [1, 3], tmp_path / "mean")
    assert command("export")([tmp_path / "mean", tmp_path / "model"]) == 0
    assert "Mean of the checkpoints of steps 1, 3, after" in (tmp_path / "model" / "README.md").read_text()


def spoil_a_weight(run: Path, step: int) -> None:
    """Make a weight NaN, with hashes that are right."""
    checkpoint = find_checkpoint(run, step)
    good = dict(whole_tensors(checkpoint))["decoder.final_layernorm.weight"]
    bad = good.clone()
    bad[3] = float("nan")
    (shard,) = checkpoint.glob("*.distcp")
    before, content = hash_file(shard).sha256, shard.read_bytes()
    assert content.count(good.numpy().tobytes()) == 1
    shard.write_bytes(content.replace(good.numpy().tobytes(), bad.numpy().tobytes()))
    manifest = checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text().replace(before, hash_file(shard).sha256))


def replace_in_config(run: Path, before: str, after: str) -> None:
    """Change config.yaml."""
    text = (run / "config.yaml").read_text()
    assert text.count(before) == 1
    (run / "config.yaml").write_text(text.replace(before, after))


REFUSED: dict[str, Callable[[Path], Any]] = {
    "step_00000002 has 1 of 32 weights in decoder.final_layernorm.weight that are NaN": lambda run: spoil_a_weight(
        run, 2
    ),
    "step_00000001 is damaged": lambda run: (run / "checkpoints" / "step_00000001" / ".metadata").write_bytes(b""),
    "has no checkpoint of step 1: there are 2, 3": lambda run: shutil.rmtree(run / "checkpoints" / "step_00000001"),
    r"is not of the model in config.yaml: .* has the shape \[4, .* and should have \[3,": (
        lambda run: replace_in_config(run, "layers: 4", "layers: 3")
    ),
    r"is not of the model in config.yaml: only one of them has \['output_layer.weight'\]": (
        lambda run: replace_in_config(run, "tied_embeddings: true", "tied_embeddings: false")
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused_leaves_nothing(runs: Callable[[str], Path], tmp_path: Path, words: str) -> None:
    shutil.copytree(runs("gated"), tmp_path / "run")
    REFUSED[words](tmp_path / "run")
    with pytest.raises(UserError, match=words):
        average_checkpoints(tmp_path / "run", [1, 2, 3], tmp_path / "mean")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_killed_before_its_end_it_is_not_there(runs: Callable[[str], Path], tmp_path: Path) -> None:
    """With the checkpoint written, before the folder has its name."""
    program = f"""
import os, signal
from sepllm_train.runs import average
average.find_tokenizer = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
average.average_checkpoints({str(runs("bf16"))!r}, [1, 3], {str(tmp_path / "mean")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=HANG_SECONDS, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["mean.partial"]
    average_checkpoints(runs("bf16"), [1, 3], tmp_path / "mean")
    assert [path.name for path in tmp_path.iterdir()] == ["mean"]
    open_run(tmp_path / "mean")


LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel": {"tensor": 2, "sequence": True}},
    "pipeline": {"parallel": {"pipeline": 2}},
    "context": {"parallel": {"context": 2}},
    "sharded": {"parallel": {"sharded_optimizer": True}},
    "sharded, bf16": {"parallel": {"sharded_optimizer": True}, "training": {"precision": "bf16"}},
}


@pytest.mark.slow
@pytest.mark.distributed
def test_checkpoints_of_any_layout(runs: Callable[[str], Path], sample_cache: Path, tmp_path: Path) -> None:
    """Also of several layouts in one run, whose vocabularies are padded to other lengths."""
    trainings = [{"name": name, **GATED, **groups} for name, groups in LAYOUTS.items()]
    run_ranks(train_all, 2, root=str(tmp_path), cache=str(sample_cache), runs=trainings)
    shutil.copytree(tmp_path / "tensor", tmp_path / "mixed")
    step = Path("checkpoints") / "step_00000001"
    shutil.rmtree(tmp_path / "mixed" / step)
    shutil.copytree(runs("gated") / step, tmp_path / "mixed" / step)
    average_checkpoints(runs("gated"), [1, 2, 3], tmp_path / "mean of one")
    expected, loss = tensors(tmp_path / "mean of one"), evaluate_run(open_run(tmp_path / "mean of one"), 2)["loss"]
    for name in (*LAYOUTS, "mixed"):
        mean = tmp_path / f"mean of {name}"
        average_checkpoints(tmp_path / name, [1, 2, 3], mean)
        found = tensors(mean)
        bar = 1e-2 if "bf16" in name else 1e-5
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            assert tensor.shape == expected[key].shape
            assert (tensor.float() - expected[key]).abs().max() < bar, f"{name}: {key}"
        assert abs(evaluate_run(open_run(mean), 2)["loss"] - loss) < bar, name

"""manifest.json, state.json, run.json, requeue.json, metrics.jsonl: what they should be, or one sentence."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.base.errors import UserError
from sepllm_train.config.load import configuration_of
from sepllm_train.metrics.log import MetricsLog
from sepllm_train.runs.open import Checkpoint
from sepllm_train.training import run_folder
from sepllm_train.training.checkpoint.files import damage, find, newest, read_manifest, read_state
from sepllm_train.training.requeue import decide

ARCHIVE = Path(__file__).resolve().parents[1] / "golden" / "files" / "run.tar.gz"
DEEP = "[" * 100_000 + "]" * 100_000
BROKEN = {
    "empty": "",
    "list": "[]",
    "null": "null",
    "torn": '{"files": {',
    "deep": DEEP,
    "wide": '{"files": {"state.json": {"bytes": 1'
    + "0" * 5000
    + ', "sha256": ""}}, "state": {"step": 1'
    + "0" * 5000
    + "}}",
    "binary": "\udcff\udcfe",
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole checkpoint that an earlier version wrote."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return next(tmp_path.rglob("manifest.json")).parent


def sentence(action: Callable[[], Any], path: Path) -> str:
    """The message of a UserError about `path`, without its place."""
    with pytest.raises(UserError) as refused:
        action()
    message = str(refused.value)
    assert "\n" not in message and str(path) in message and len(message) < 500 + len(str(path))
    return message.replace(f"{path}", "FILE")


def changed(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the JSON of a file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_json_of_a_checkpoint_that_is_none(checkpoint: Path, name: str, content: str) -> None:
    path = checkpoint / name
    path.write_bytes(content.encode(errors="surrogateescape"))
    sentence(lambda: (read_manifest if name == "manifest.json" else read_state)(checkpoint), path)
    assert str(path) in (damage(checkpoint) or "")
    assert newest(checkpoint.parent.parent) is None


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "only_state": (
        lambda files: [files.pop(name) for name in list(files) if name != "state.json"],
        "does not list .meta",
    ),
    "no_metadata": (lambda files: files.pop(".metadata"), "does not list .metadata"),
    "no_state": (lambda files: files.pop("state.json"), "does not list state.json"),
    "no_tensors": (
        lambda files: [files.pop(name) for name in list(files) if "distcp" in name],
        "does not list __0_0.d",
    ),
    "above": (
        lambda files: files.update({"../x": files["state.json"]}),
        "names '../x', which is no file of this folder",
    ),
    "parent": (lambda files: files.update({"..": files["state.json"]}), "names '..', which"),
    "folder": (lambda files: files.update({".": files["state.json"]}), "names '.', which"),
    "absolute": (lambda files: files.update({"/etc/passwd": files["state.json"]}), "names '/etc/passwd', which"),
    "nothing": (lambda files: files.update({"": files["state.json"]}), "names '', which"),
    "zero": (lambda files: files.update({"a\0b": files["state.json"]}), "which is no file of this folder"),
    "itself": (lambda files: files.update({"manifest.json": files["state.json"]}), "names 'manifest.json', which"),
    "long": (lambda files: files.update({"a" * 5000: files["state.json"]}), "which is no file of this folder"),
    "more": (lambda files: files.update({"__9_0.distcp": files["state.json"]}), "__9_0.distcp is missing"),
    "no_size": (lambda files: files["state.json"].pop("bytes"), "files.state.json.bytes is missing"),
    "text_size": (lambda files: files["state.json"].update(bytes="12"), "bytes is '12', which is not a whole number"),
    "true_size": (lambda files: files["state.json"].update(bytes=True), "bytes is True, which is not a whole number"),
    "negative": (lambda files: files["state.json"].update(bytes=-1), "bytes is -1, which is not a whole number"),
    "hash": (lambda files: files["state.json"].update(sha256=None), "sha256 is None, which is no text"),
    "entry": (lambda files: files.update({"state.json": []}), "files.state.json is a list, which is no object"),
}


@pytest.mark.parametrize(("change", "words"), MANIFESTS.values(), ids=MANIFESTS.keys())
def test_manifest_that_is_not_of_every_file_of_its_folder(
    checkpoint: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    assert damage(checkpoint) is None
    changed(checkpoint / "manifest.json", lambda content: change(content["files"]))
    reason = damage(checkpoint)
    assert reason is not None and words in reason and not reason.endswith(".")
    with pytest.raises(UserError, match="is damaged"):
        find(str(checkpoint))


def test_tensors_that_the_manifest_does_not_list(checkpoint: Path) -> None:
    shutil.copy(checkpoint / "__0_0.distcp", checkpoint / "__1_0.distcp")
    assert damage(checkpoint) == f"{checkpoint / 'manifest.json'} does not list __1_0.distcp"
    (checkpoint / "__1_0.distcp").unlink()
    # A file that nobody reads is not the checkpoint's.
    (checkpoint / "notes.txt").write_text("the good one")
    assert damage(checkpoint) is None


def test_folder_in_place_of_a_file(checkpoint: Path) -> None:
    tensors = checkpoint / "__0_0.distcp"
    tensors.unlink()
    tensors.mkdir()
    assert damage(checkpoint) == f"{tensors} is not a plain file"


STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no_state": (lambda state: state.pop("state"), "state is missing"),
    "list": (lambda state: state.update(state=[]), "state is a list, which is no object"),
    "no_step": (lambda state: state["state"].pop("step"), "state.step is missing"),
    "text_step": (lambda state: state["state"].update(step="4"), "state.step is '4'"),
    "half_step": (lambda state: state["state"].update(step=1.5), "state.step is 1.5"),
    "negative": (lambda state: state["state"].update(tokens=-1), "state.tokens is -1"),
    "infinite": (lambda state: state["state"].update(seconds=float("inf")), "state.seconds is inf"),
    "nan": (lambda state: state["state"].update(recent_norms=[1.0, float("nan")]), "state.recent_norms[1] is nan"),
    "norms": (lambda state: state["state"].update(recent_norms=1.0), "state.recent_norms is 1.0, which is no list"),
    "phases": (lambda state: state["state"].update(finished_pairs=[None]), "state.finished_pairs[0] is None"),
    "optimizer": (lambda state: state.update(optimizer=4), "optimizer is 4, which is no object"),
    "updates": (lambda state: state["optimizer"].update(step=None), "optimizer.step is None"),
    "scaler": (lambda state: state["optimizer"].update(grad_scaler={}), "optimizer.grad_scaler.scale is missing"),
    "layout": (lambda state: state.update(layout={"tensor": []}), "layout.tensor is a list"),
    "identity": (lambda state: state.update(identity="sep"), "identity is 'sep', which is no object"),
    "schedule": (lambda state: state.update(schedule=None), "schedule is None, which is no object"),
    "data": (
        lambda state: state["identity"].update({"data.tokens_sha256": "ab"}),
        "identity.data.tokens_sha256 is 'ab'",
    ),
    "weight": (
        lambda state: state["identity"].update({"data.tokens_sha256": {"guide": {"sha256": "a", "weight": "1"}}}),
        "guide.weight is '1'",
    ),
    "earlier": (lambda state: state["identity"].update({"data.earlier": [{}]}), "data.earlier[0].data is missing"),
    "vocabulary": (lambda state: state["identity"].update({"model.vocabulary": 0}), "model.vocabulary is 0"),
}


@pytest.mark.parametrize(("change", "words"), STATES.values(), ids=STATES.keys())
def test_state_of_another_shape(checkpoint: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    read_state(checkpoint)
    changed(checkpoint / "state.json", change)
    message = sentence(lambda: read_state(checkpoint), checkpoint / "state.json")
    assert f"FILE: {words}" in message or words in message
    assert message.endswith(": choose another checkpoint.")


def test_state_that_lacks_what_an_analysis_needs(checkpoint: Path) -> None:
    Checkpoint.read(checkpoint)
    changed(checkpoint / "state.json", lambda state: state.update(identity={}))
    assert "identity.model.vocabulary is missing" in sentence(
        lambda: Checkpoint.read(checkpoint), checkpoint / "state.json"
    )


RUNS: dict[str, tuple[str, str]] = {
    **{name: (content, "FILE") for name, content in BROKEN.items() if name != "wide"},
    "status": ('{"status": 1}', "status is 1, which is no text"),
    "origin": ('{"origin": ["x"]}', "origin is a list, which is no text"),
    "identity": ('{"identity": [1]}', "identity is a list, which is no object"),
    "earlier": ('{"identity": {"data.earlier": 3}}', "identity.data.earlier is 3, which is no list"),
    "schedule": ('{"schedule": 7, "identity": {}}', "schedule is 7, which is no object"),
    "step": ('{"identity": {}, "x": 1e999}', ""),
}


@pytest.mark.parametrize(("content", "words"), RUNS.values(), ids=RUNS.keys())
def test_run_json_of_another_shape(tmp_path: Path, content: str, words: str) -> None:
    """A run that enters the folder again reads it: nothing is trained and nothing is changed."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    path = folder / "run.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    config = configuration_of(["name=run", f"run_root={tmp_path}"])
    if not words:
        run_folder.enter(config, {}, {})
        return
    message = sentence(lambda: run_folder.enter(config, {}, {}), path)
    assert words in message and message.endswith(": put back a copy of it, or choose another name=.")
    assert sorted(file.name for file in folder.iterdir()) == ["metrics.jsonl", "run.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *((content, "FILE") for name, content in BROKEN.items() if name != "wide"),
        ('{"job": "1"}', "step is missing"),
        ('{"job": 1, "step": 3}', "job is 1, which is no text"),
        ('{"job": "1", "step": "3"}', "step is '3', which is not a whole number"),
        ('{"job": "1", "step": 1e400}', "the number 1e400, beyond"),
    ],
)
def test_record_of_a_requeue_of_another_shape(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "requeue.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    message = sentence(lambda: decide(tmp_path, "1"), path)
    assert words in message and message.endswith(": delete it.")


@pytest.mark.parametrize("line", [DEEP, "1e999", '{"step": true}', '{"step": ' + "9" * 5000 + "}", "null"])
def test_line_that_is_no_record_is_dropped_when_a_run_resumes(
    tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    flops = 10**25
    path.write_text(f'{{"step": 1, "flops/model": {flops}}}\n{line}\n{{"step": 2}}\n')
    log = MetricsLog(path)
    assert log.has(1, "flops/model") and not log.has(3, "step")
    log.rewind(2)
    assert json.loads(path.read_text()) == {"step": 1, "flops/model": flops}
    assert "warning: line 2 of" in capsys.readouterr().out

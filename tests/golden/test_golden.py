"""The golden comparison itself: what it notices, what it runs, what it leaves behind. `make golden` runs the cases."""

from __future__ import annotations

import copy
import gzip
import json
import math
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.golden import __main__ as golden
from tests.golden import sides
from tests.golden.archives import FILES, NAMES, pack
from tests.golden.cases import BY_NAME, CASES, Case, with_needs
from tests.golden.compare import differences, largest
from tests.golden.side import KINDS, Tree, without_machine
from tests.support.waiting import wait_until

OUTCOME: dict[str, Any] = {
    "records": [{"step": 1, "train/loss": 6.5, "val/loss": None}, {"step": 2, "train/loss": 6.25, "empty": []}],
    "digest": "ab" * 32,
    "tensors": {"weight": "12" * 32, "bias": "34" * 32},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """OUTCOME with another value at `path`; None removes it."""
    outcome = copy.deepcopy(OUTCOME)
    *way, last = path.split("/", 2) if path.startswith("records") else path.split("/")
    place: Any = outcome
    for key in way:
        place = place[int(key)] if isinstance(place, list) else place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return outcome


def test_equal_outcomes_have_no_differences() -> None:
    assert differences(OUTCOME, json.loads(json.dumps(OUTCOME))) == []
    assert differences({"loss": math.nan}, {"loss": math.nan}) == []


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("records/0/train/loss", math.nextafter(6.5, 7), "-> 6.500000000000001 (+8.88e-16, +1.37e-16 relative, 1 ulp)"),
        ("records/1/train/loss", math.nextafter(6.25, 6), "(-8.88e-16, -1.42e-16 relative, 1 ulp)"),
        ("records/0/train/loss", math.nan, "6.5 -> nan"),
        ("records/0/step", 1.0, "1 -> 1.0"),
        ("records/0/step", 3, "1 -> 3 (+2, +2.00e+00 relative)"),
        ("records/0/val/loss", 1.0, "None -> 1.0"),
        ("records/1/empty", None, "only in the reference"),
        ("tensors/weight", "56" * 32, "'121212121212121... -> '565656565656565..."),
        ("tensors/bias", None, "only in the reference"),
        ("tensors/other", "56" * 32, "only in the working tree"),
    ],
)  # fmt: skip
def test_a_change_is_found_and_measured(path: str, value: Any, line: str) -> None:
    (found,) = differences(OUTCOME, changed(path, value))
    assert found.startswith(f"{path}: ") and found.endswith(line)


def test_the_largest_difference_is_named() -> None:
    other = changed("records/0/train/loss", 6.5000065)
    other["records"][1]["train/loss"] = 6.2500125
    assert largest(OUTCOME, other) == "largest relative difference of a number: 2.00e-06, records/1/train/loss"
    assert largest(OUTCOME, changed("digest", "cd" * 32)) is None


def test_a_lost_record_is_found() -> None:
    shorter = {**OUTCOME, "records": OUTCOME["records"][:1]}
    assert {line.split(": ")[1] for line in differences(OUTCOME, shorter)} == {"only in the reference"}


def test_cases_are_what_must_stay(golden_files: Path) -> None:
    """Each thing that is kept bitwise has a case; jobs are of a known kind, and needs come first."""
    overrides = {case.name: " ".join(case.job.get("arguments", [])) for case in CASES}
    for name, words in {
        "dense": "attention=dense",
        "sep": "+experiment=demo_sep",
        "tiers": "attention.separate_documents=true attention.sink=learned",
        "tied": "model.tied_embeddings=true",
        "tensor2": "parallel.tensor=2",
        "tensor2_sequence": "parallel.sequence=true",
        "pipeline2": "parallel.pipeline=2",
        "interleaved": "parallel.virtual_pipeline=2",
        "context2": "parallel.context=2",
        "sharded_optimizer": "parallel.sharded_optimizer=true",
        "bf16": "training.precision=bf16",
        "full_recompute": "training.recompute=full",
        "selective_recompute": "training.recompute=selective training.loss_chunk=64",
        "resume": "resume=runs/sep/checkpoints/step_00000003",
    }.items():
        assert words in overrides[name], name
    kinds = {case.job["kind"] for case in CASES}
    assert kinds == KINDS.keys() and not any("data=sample" in words for words in overrides.values())
    assert len(BY_NAME) == len(CASES)
    assert json.loads((golden_files / "data" / "guide.sep.json").read_text())["tokenizer"]["vocab_size"] % 128
    for number, case in enumerate(CASES):
        assert set(case.needs) <= {earlier.name for earlier in CASES[:number]}
    assert [case.name for case in with_needs(["transformers_cache"])] == ["sep", "export", "transformers_cache"]


@pytest.mark.parametrize("name", NAMES)
def test_archives_are_written_the_same_again(name: str, golden_files: Path, tmp_path: Path) -> None:
    """Compared as tar files: other versions of zlib compress to other bytes."""
    again, stored = (
        gzip.decompress(path.read_bytes()) for path in (pack(golden_files / name, tmp_path), FILES / f"{name}.tar.gz")
    )
    assert again == stored


def test_what_describes_the_machine_is_left_out() -> None:
    result = {"loss": 1.0, "seconds": 2.0, "step_seconds": 0.1, "git": {"commit": "a"}, "rows": [{"started": "now"}]}
    assert without_machine(result) == {"loss": 1.0, "rows": [{}]}


@pytest.fixture
def two_sides(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Outcomes of a case by side, in place of processes and a worktree; `calls` are the cases that were run."""
    made: dict[str, Any] = {"reference": OUTCOME, "working": OUTCOME, "calls": [], "prints": {"commit": "0" * 40}}

    def run(side: sides.Side, case: Case) -> None:
        made["calls"].append(f"{side.name} {case.name}")
        outcome = made[side.name]
        side.outcomes[case.name] = {"outcome": outcome} if outcome is not None else {"error": "exit code 1: lost"}

    monkeypatch.setattr(sides.Side, "run", run)
    monkeypatch.setattr(golden, "fingerprint", lambda commit: made["prints"])
    monkeypatch.setattr(golden, "check_versions", lambda commit: None)
    monkeypatch.setattr(golden, "commit_of", lambda revision: "0" * 40)
    monkeypatch.setattr(golden, "worktree", lambda commit, folder: golden.nullcontext(folder))
    return made


def test_exit_code_and_lines(two_sides: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cases", "dense", "--output", str(tmp_path)]
    assert golden.main(arguments) == 0
    assert "dense: equal (9 values)" in capsys.readouterr().out
    two_sides["working"] = changed("digest", "cd" * 32)
    assert golden.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "dense: DIFFERS in 1 of 9 values" in printed and printed.endswith("not equal: dense\n")
    two_sides["working"] = None
    assert golden.main(arguments) == 1
    assert "working failed: exit code 1: lost" in capsys.readouterr().out


def test_the_reference_is_run_again_only_when_something_has_changed(two_sides: dict[str, Any], tmp_path: Path) -> None:
    arguments = ["--output", str(tmp_path), "--cases"]
    assert golden.main([*arguments, "export"]) == 0
    assert sorted(two_sides["calls"]) == ["reference export", "reference sep", "working export", "working sep"]
    two_sides["calls"].clear()
    assert golden.main([*arguments, "export", "dense"]) == 0
    assert sorted(two_sides["calls"]) == ["reference dense", "working dense", "working export", "working sep"]
    two_sides["calls"].clear()
    two_sides["prints"] = {"commit": "1" * 40}
    assert golden.main([*arguments, "dense"]) == 0
    assert sorted(two_sides["calls"]) == ["reference dense", "working dense"]


def test_a_failed_reference_is_not_kept(two_sides: dict[str, Any], tmp_path: Path) -> None:
    two_sides["reference"] = None
    assert golden.main(["--cases", "dense", "--output", str(tmp_path)]) == 1
    two_sides["reference"] = OUTCOME
    assert golden.main(["--cases", "dense", "--output", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--cases", "densee"], "error: --cases densee is unknown: choose from dense, sep,"),
        (["--reference", "no-such-revision"], "error: "),
        (["--reference", "HEAD", "--output", __file__], "is a file: name a folder."),
    ],
)
def test_mistakes(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main(words) == 2
    errors = capsys.readouterr().err
    assert sentence in errors and errors.count("\n") == 1


def test_code_of_another_tree_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "pretrain.py").touch()
    with pytest.raises(RuntimeError, match="sepllm_train come from .*, not from "):
        Tree.at(tmp_path)
    with pytest.raises(RuntimeError, match="has none of .*scripts/pretrain.py"):
        Tree.at(tmp_path / "scripts")


def test_the_worktree_is_removed_whatever_happens(tmp_path: Path) -> None:
    if not (sides.REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    place = tmp_path / "tree"
    with pytest.raises(KeyboardInterrupt), sides.worktree(sides.commit_of("HEAD"), place) as tree:
        assert (tree / "sepllm_train" / "__init__.py").is_file()
        raise KeyboardInterrupt
    assert not place.exists() and str(place) not in sides.git("worktree", "list").stdout


def test_nothing_outlives_a_stop(tmp_path: Path) -> None:
    """A process and its child in a session of its own, as a rank of torchrun."""
    processes = sides.Processes()
    parent = "import subprocess; subprocess.run(['sleep', '60'], start_new_session=True)"
    arguments = ([sys.executable, "-c", parent], tmp_path, dict(os.environ), tmp_path / "log")
    thread = threading.Thread(target=processes.run, args=arguments)
    thread.start()

    def found() -> list[psutil.Process]:
        return [child for pid in list(processes.running) for child in psutil.Process(pid).children()]

    wait_until(found, "a child of the process")
    children = found()
    processes.stop()
    thread.join()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in alive)


def test_a_reference_for_other_versions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = 'setup(python_requires=">=3.11", install_requires=["torch>=2.11", "megatron-core==0.1.0", "numpy<1"])'
    monkeypatch.setattr(sides, "git", lambda *_: SimpleNamespace(stdout=setup))
    with pytest.raises(sides.BadInput, match=r"abcdef0 does not run here: megatron-core \S+ is not ==0.1.0"):
        sides.check_versions("abcdef0123")

"""The program `sepllm`: its list of commands, ways out, and old names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest

from sepllm_train.base.errors import BadSteps, UserError
from sepllm_train.cli import compare, old
from sepllm_train.cli.main import COMMANDS, GROUPS, main
from tests.support.waiting import HANG_SECONDS


def test_help_lists_every_command_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
    assert [line for line in lines if line.endswith(":")] == [f"{group}:" for group in GROUPS]
    assert max(map(len, lines)) <= 100


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sepllm {metadata.version('sepllm-train')}\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "usage: sepllm COMMAND ..."),
        (["evalute"], "error: sepllm has no command 'evalute' (did you mean evaluate?): sepllm --help lists the"),
        (["--runs"], "error: sepllm has no command '--runs': sepllm --help lists the"),
    ],
)
def test_no_command(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(sentence)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([command, "--help"])
    except SystemExit as ended:
        code = ended.code  # type: ignore[assignment]
    told = capsys.readouterr().out
    assert code in (0, None) and told.startswith(f"usage: sepllm {command} ")
    assert max(map(len, told.splitlines())) <= 120


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (UserError("no."), 2, "error: no.\n"),
        (BadSteps("bad."), 3, "error: bad.\n"),
        (KeyboardInterrupt(), 130, ""),
        (ModuleNotFoundError("gone", name="wandb.sdk"), 2, "error: wandb is not installed: pip install -e '.[wandb]'"),
    ],
)
def test_ways_out(
    error: BaseException, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(words: Sequence[str]) -> None:
        raise error

    monkeypatch.setattr(compare, "main", failing)
    assert main(["compare"]) == code
    assert capsys.readouterr().err.startswith(told)


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(words: Sequence[str]) -> None:
        raise ModuleNotFoundError("gone", name="torch")

    monkeypatch.setattr(compare, "main", failing)
    with pytest.raises(ModuleNotFoundError):
        main(["compare"])


def test_from_any_folder(tmp_path: Path) -> None:
    """`python -m sepllm_train`, and nobody who reads what it prints."""
    command = [sys.executable, "-m", "sepllm_train"]
    done = subprocess.run([*command, "compare"], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 2 and done.stderr.startswith("usage: sepllm compare ")
    reader, writer = os.pipe()
    os.close(reader)
    asked = [*command, "pretrain", "--keys"]
    done = subprocess.run(asked, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=HANG_SECONDS)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_old_scripts_name_the_new_command(repository: Path, tmp_path: Path) -> None:
    script = str(repository / "scripts" / "compare_runs.py")
    done = subprocess.run([sys.executable, script, str(tmp_path)], capture_output=True, text=True, timeout=HANG_SECONDS)
    first, *rest = done.stderr.splitlines()
    assert first == "compare_runs is now `sepllm compare`; the old name goes with the next release."
    assert done.returncode == 2 and rest[-1].startswith("sepllm compare: error: ")


@pytest.mark.parametrize("name", old.NEW)
def test_old_names_lead_to_commands(name: str, repository: Path) -> None:
    assert old.NEW[name].split()[0] in COMMANDS
    assert name.startswith("sepllm-") or (repository / "scripts" / f"{name}.py").is_file()


@pytest.mark.parametrize(
    ("name", "words", "new"),
    [
        ("scripts/compare_runs.py", ["a", "--serve"], ["watch", "a"]),
        ("sepllm-compare-runs", ["a", "--output", "b"], ["compare", "a", "--output", "b"]),
        (
            "analyze_separators.py",
            ["attention", "a", "--separators=all"],
            ["analyze", "attention", "a", "--classes=all"],
        ),
        ("kv_share.py", ["--limit", "3"], ["evaluate", "kv", "--limit", "3"]),
    ],
)
def test_old_words_become_new_ones(
    name: str, words: list[str], new: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(old, "sepllm", lambda found: 0 if found == new else 1)
    assert old.main(name, words) == 0
    assert capsys.readouterr().err.count("\n") == 1

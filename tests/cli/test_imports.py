"""Help and mistakes are answered before anything large is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sepllm_train.cli.main import COMMANDS
from tests.support.waiting import HANG_SECONDS

LARGE = ("torch", "megatron", "transformers", "matplotlib", "wandb", "lm_eval")
CONFIGURING = ("hydra", "omegaconf")
PROGRAM = """
import json, sys
from sepllm_train.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
print()
print(json.dumps([code, sorted(sys.modules)]))
"""
HELP = [(command, "--help") for command in COMMANDS] + [
    ("--help",), ("--version",), ("pretrain", "--keys"), ("analyze", "loss", "--help"), ("evaluate", "kv", "--help"),
    ("evaluate", "needles", "--help"), ("evaluate", "report", "--help"), ("match", "interval", "--help"),
    ("prepare", "tokenize", "--help"), ("probe", "ask", "--help"), ("stream", "score", "--help"),
]  # fmt: skip
DATA = ("data=prefixes", "data.prefixes=[nowhere]")
SCORE = ("--text", "page.txt", "--output", "out")
MISTAKES = {
    # Words that cannot be.
    ("nothing",): "has no command",
    ("generate",): "required",
    ("generate", "nowhere", "--prompt", "x", "--tokens", "0"): "--tokens 0 must be at least 1",
    ("generate", "nowhere", "--prompt", "x", "--window", "4"): "--window does not apply to pattern",
    ("generate", "nowhere", "--prompt", "x", "--top-p", "2"): "--top-p 2.0 must be",
    ("stream", "score", "nowhere", *SCORE, "--every", "5"): "--every=5 must be a multiple",
    ("stream", "chat", "nowhere", "--cache", "fixed"): "fixed needs --interval",
    ("evaluate", "nowhere", "--tasks", "hellswag"): "the task 'hellswag' is unknown",
    ("evaluate", "nowhere", "--tasks", "piqa", "--interval", "4"): "--interval does not apply to pattern",
    ("evaluate", "nowhere", "--tasks", "piqa", "--limit", "0"): "--limit 0 must be at least 1",
    ("match", "interval", "--samples", "0"): "--samples 0 must be at least 1",
    ("pretrain", "--nproc", "0"): "--nproc 0 must be at least 1",
    # Overrides.
    ("pretrain", "+experiment=demo_sepp"): "did you mean demo_sep?",
    ("pretrain", "optim.lrr=1"): "did you mean optim.lr?",
    ("pretrain", "--nproc", "2", "optim.lrr=1"): "did you mean optim.lr?",
    ("pretrain", "attention.window=0"): "attention.window=0",
    ("pretrain", "--nproc", "3", "+experiment=demo_sep", "training.global_batch=8"): "must be a multiple of",
    ("suite", "+suite=papers"): "did you mean paper?",
    ("suite", "+suite=paper", "suite.jops=2"): "did you mean suite.jobs?",
    ("match", "keep-share", "attention=tierss"): "did you mean tiers?",
    ("pretrain", "+experiment=demo_sep", "attention.separators=[comma,peroid]"): "did you mean period?",
    ("pretrain", "+experiment=demo_sep", "name=finished", "run_root=../runs"): "resume=../runs/finished name=NEW",
    ("pretrain", "--experiment", "demo_sep"): "write +experiment=demo_sep",
    ("pretrain", "+training.stepz=3"): "did you mean training.steps?",
    ("suite", "--suite", "paper"): "write +suite=paper",
    # Runs and folders of runs.
    ("generate", "../runs", "--prompt", "x"): "is a folder of runs (finished, other): give one of them",
    ("generate", "../runs/other", "--prompt", "x", "--checkpoint", "9"): "has no checkpoint of step 9: there are 4.",
    ("generate", "../runs/other/checkpoints", "--prompt", "x"): "is inside of a run: give the run itself",
    ("stream", "score", "../runs", *SCORE): "is a folder of runs",
    ("evaluate", "../runs", "--tasks", "piqa"): "is a folder of runs",
    ("analyze", "loss", "../runs", "--output", "out"): "is a folder of runs",
    ("analyze", "loss", "../runs/other", "--output", "out", "--samples", "0"): "--samples 0 must be at least 1",
    ("analyze", "loss", "../runs/other", "--output", "out", "--held-out", "2"): "--held-out 2.0 must be",
    ("analyze", "loss", "../runs/other", "--output", "page.txt"): "--output page.txt is a file",
    ("analyze", "attention", "../runs/other", "--output", "out", "--data", "no"): "There is no dataset at",
    ("export", "../runs", "out"): "is a folder of runs",
    ("analyze", "recovery", "../runs"): "../runs/finished/config.yaml does not exist",
    ("probe", "ask", "../runs", "--output", "out"): "../runs/finished/config.yaml does not exist",
    ("export", "../runs/other", "."): ". exists already: choose another name or pass --overwrite.",
    ("import", "../model", "."): ". exists already: choose another name or pass --overwrite.",
    ("import", "../model", "out", "--data", "no"): "There is no dataset at",
    ("average", "../runs", "out", "--last", "1"): "is a folder of runs",
    ("average", "../model", "out", "--last", "1"): "../model is a transformers model, not a run",
    ("average", "../runs/other", "out"): "one of the arguments --last --steps is required",
    ("average", "../runs/other", "out", "--last", "0"): "--last 0 must be at least 1",
    ("average", "../runs/other", "out", "--last", "2"): "more checkpoints than ../runs/other has: there are 4.",
    ("average", "../runs/other", "out", "--steps", "4,9"): "has no checkpoint of step 9: there are 4.",
    ("average", "../runs/other", "out", "--steps", "4,4"): "--steps names 4 twice",
    ("average", "../runs/other", ".", "--last", "1"): ". exists already: choose another name.",
    ("pretrain", "+experiment=demo_sep", "name=mean", "run_root=../made"): "with init_from=../made/mean name=NEW",
    ("pretrain", "+experiment=demo_sep", "resume=../made/mean"): "../made/mean holds averaged weights without",
    # Files that are not there.
    ("pretrain", "+experiment=demo_sep", *DATA): "There is no dataset at",
    ("pretrain", "--nproc", "2", "+experiment=demo_sep", *DATA): "There is no dataset at",
    ("pretrain", "+experiment=demo_sep", "init_from=nowhere"): "init_from=nowhere: there is no checkpoint there",
    ("pretrain", "+experiment=demo_sep", "resume=nowhere"): "resume=nowhere: there is no checkpoint there",
    ("suite", "+suite=paper", "suite.size=cpu", "suite.text=[nowhere.txt]"): "There is no file nowhere.txt",
    ("suite", "+suite=paper", "suite.size=cpu", "suite.prefix=nowhere"): "There is no dataset at",
    ("match", "interval", "+experiment=demo_sep", *DATA): "There is no dataset at",
    ("prepare", "tokenize", "nowhere.txt", "--tokenizer", "t.json", "--output", "out"): "t.json",
    ("compare", "nowhere", "elsewhere", "--output", "out"): "nowhere",
    ("watch", "nowhere"): "nowhere is not a folder",
    ("analyze", "corpus", "nowhere", "--output", "out"): "There is no dataset at nowhere",
    ("analyze", "loss", "nowhere", "--output", "out"): "config.yaml does not exist",
    ("analyze", "recovery", "nowhere"): "config.yaml does not exist",
    ("probe", "ask", "nowhere", "--output", "out"): "config.yaml does not exist",
    ("probe", "text", "nowhere.txt", "--tokenizer", "t.json", "--output", "out.jsonl"): "t.json",
    ("generate", "nowhere", "--prompt", "x"): "config.yaml does not exist",
    ("generate", "nowhere", "--prompt-file", "nowhere.txt"): "the prompts nowhere.txt cannot be read",
    ("stream", "score", "nowhere", *SCORE): "nowhere is neither a run",
    ("stream", "score", "nowhere", "--text", "nowhere.txt", "--output", "out"): "There is no file nowhere.txt",
    ("stream", "report", "nowhere"): "result.json is not there",
    ("evaluate", "nowhere", "--tasks", "piqa"): "nowhere is neither a run",
    ("evaluate", "nowhere", "--tasks", "piqa", "--data-dir", "none"): "--data-dir none is not a folder",
    ("evaluate", "kv", "--data-dir", "none", "--tokenizer", "t.json"): "t.json",
    ("evaluate", "report", "nowhere"): "nowhere holds no results",
    ("export", "nowhere", "out"): "config.yaml does not exist",
    ("import", "nowhere", "out"): "config.json cannot be read",
    ("average", "nowhere", "out", "--last", "1"): "config.yaml does not exist",
}  # fmt: skip


def answer(words: tuple[str, ...], folder: Path) -> tuple[int, str, set[str]]:
    """Exit code, what was printed, and the modules that were imported, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=True,
    )
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code or 0, done.stdout + done.stderr, set(modules)


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help(words: tuple[str, ...], tmp_path: Path) -> None:
    code, _, modules = answer(words, tmp_path)
    assert code == 0
    assert not modules & {*LARGE, *CONFIGURING, "numpy"}


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_mistakes(words: tuple[str, ...], tmp_path: Path) -> None:
    other, place = tmp_path / "runs" / "other", tmp_path / "here"
    mean = tmp_path / "made" / "mean"
    step = other / "checkpoints" / "step_00000004"
    for folder in (tmp_path / "runs" / "finished", step, tmp_path / "model", mean, place):
        folder.mkdir(parents=True)
    (mean / "run.json").write_text('{"status": "averaged"}')
    (other / "config.yaml").write_text("name: other\n")
    (tmp_path / "runs" / "finished" / "metrics.jsonl").touch()
    (tmp_path / "runs" / "finished" / "run.json").write_text('{"status": "finished"}')
    (tmp_path / "model" / "config.json").write_text("{}")
    (place / "page.txt").write_text("A page.")
    code, told, modules = answer(words, place)
    assert code == 2 and MISTAKES[words] in told and "Traceback" not in told
    assert not modules & set(LARGE)
    assert words[0] in ("pretrain", "suite", "match") or not modules & set(CONFIGURING)
    assert [path.name for path in place.iterdir()] == ["page.txt"]

"""sepllm pretrain: what it explains, and ranks of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from sepllm_train.cli.pretrain import GROUPS, OFTEN
from sepllm_train.config.folder import config_folder
from sepllm_train.config.keys import keys_of, matching
from sepllm_train.config.schema import Config
from tests.support.command import command
from tests.support.free_ports import free_port
from tests.support.small_run import SMALL_RUN
from tests.support.waiting import HANG_SECONDS, wait_until

main = command("pretrain")


def test_help_explains_groups_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    words = set(re.findall(r"[\w.]+", told))
    assert set(GROUPS) == {path.name for path in config_folder().iterdir() if path.is_dir()} - {"suite"}
    for group in GROUPS:
        assert {path.stem for path in (config_folder() / group).glob("*.yaml")} <= words
    assert set(OFTEN) <= words and "--nproc" in told and "sepllm pretrain --keys [PATTERN]" in told


def test_every_key_has_a_description() -> None:
    keys = list(keys_of(Config))
    assert len(keys) > 80 and [one.name for one in keys if len(one.description) < 10] == []
    assert [one.name for one in keys if not one.description.endswith((".", ")"))] == []


def test_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--keys", "lr"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == [
        "optim.lr: float | None = null",
        "    Learning rate after warm-up; None = model.recipe.rate, the model size's own.",
    ]
    assert [one.name for one in matching(Config, "*.lr")] == ["optim.lr"]
    assert main(["--keys"]) == 0
    assert capsys.readouterr().out.count("\n    ") >= len(list(keys_of(Config)))
    assert main(["--keys", "nothing"]) == 2
    assert capsys.readouterr().err == "error: no key fits 'nothing': sepllm pretrain --keys prints all.\n"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--nproc", "0"], "--nproc 0 must be at least 1."),
        (["--nnodes", "2"], "--nnodes 2 needs --rdzv-endpoint HOST:PORT, where the nodes meet."),
        (["--nnodes", "2", "--rdzv-endpoint", "a:1", "--node-rank", "2"], "--node-rank 2 must be below --nnodes 2."),
        (["--nproc", "2", "parallel.tensor=3"], "a world of size 2 cannot be split into parallel.tensor=3"),
        (["--nproc", "2", "data=prefixes", "data.prefixes=[nowhere]"], "There is no dataset at"),
    ],
)
def test_mistakes_start_no_rank(
    options: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sepllm_train.distributed.torchrun.launch", lambda words: pytest.fail("ranks were started"))
    assert main(["+experiment=demo_sep", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_ranks_are_not_started_in_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["+experiment=demo_sep", "--nproc", "2"]) == 2
    assert "leave it out under torchrun" in capsys.readouterr().err


Ranks = Callable[..., contextlib.AbstractContextManager[subprocess.Popen[str]]]


@pytest.fixture
def ranks(
    sample_cache: Path, tmp_path: Path
) -> Callable[..., contextlib.AbstractContextManager[subprocess.Popen[str]]]:
    """Starts two ranks of a small run; gives the process that started them."""

    @contextmanager
    def started(*words: str) -> Iterator[subprocess.Popen[str]]:
        folders = [f"run_root={tmp_path}", f"data.cache={sample_cache}", "name=ranks"]
        asked = [sys.executable, "-m", "sepllm_train", "pretrain", "--nproc", "2", *SMALL_RUN, *folders, *words]
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(asked, cwd=tmp_path, env=environment, **pipes) as process:  # type: ignore[call-overload]
            try:
                yield process
            finally:
                process.kill()

    return started


ENDLESS = ("training.steps=1000000", "training.validation_interval=0", "logging.interval=1")


@pytest.mark.distributed
def test_two_ranks_train(ranks: Ranks) -> None:
    with ranks("training.steps=2") as process:
        output, errors = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, errors) == (0, "")
    assert "2 processes" in output and "CPU, 1 thread" in output
    # What the ranks alone find out: one sentence of one rank, and nothing of the launcher's.
    with ranks("training.steps=2", "resume=never") as process:
        _, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 2 and errors.startswith("error: ") and errors.count("\n") == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_two_nodes_train(ranks: Ranks) -> None:
    nodes = ("--nproc", "1", "--nnodes", "2", "parallel.tensor=2", "training.steps=2")

    def both(*words: str) -> list[tuple[int, str, str]]:
        words = (*nodes, "--rdzv-endpoint", f"localhost:{free_port()}", *words)
        with ranks(*words) as one, ranks(*words) as other:
            ends = [(node, *node.communicate(timeout=HANG_SECONDS)) for node in (one, other)]
        return [(node.returncode, output, errors) for node, output, errors in ends]

    ends = both()
    assert [(code, errors) for code, _, errors in ends] == [(0, "")] * 2
    # Rank 0 speaks, on the node it came to be on.
    assert sum("2 processes" in output for _, output, _ in ends) == 1
    # One node ends with the mistake of its rank, the other with the same code or for want of the first.
    ends = both("resume=never")
    assert {2} <= {code for code, _, _ in ends} <= {1, 2}
    for code, _, errors in ends:
        known = "has no contact with the other nodes" if code == 1 else "holds a finished run"
        assert errors == "" or (errors.startswith("error: ") and errors.count("\n") == 1 and known in errors)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)),
    ],
    ids=lambda number: number.name,
)
def test_a_signal_to_the_launcher_stops_the_ranks(
    number: signal.Signals,
    tmp_path: Path,
    ranks: Ranks,
) -> None:
    with ranks(*ENDLESS) as process:
        wait_until((tmp_path / "ranks" / "metrics.jsonl").is_file, "a step", process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75
    first, second = errors.splitlines()
    assert first.endswith("received: finishing the step, saving, then ending.")
    assert second.startswith("interrupted: ") and "the same command continues from there." in second


@pytest.mark.distributed
@pytest.mark.slow
def test_crashed_ranks_are_started_again(tmp_path: Path, ranks: Ranks) -> None:
    """--max-restarts: after a kill, but not after the signal that asks them to stop."""
    with ranks(*ENDLESS, "training.checkpoint_interval=1", "--max-restarts", "1") as process:
        latest = tmp_path / "ranks" / "checkpoints" / "latest"
        wait_until(latest.is_file, "a checkpoint", process)
        first = ranks_of(process)
        first[1].kill()
        wait_until(lambda: len(found := ranks_of(process)) == 2 and found[0] != first[0], "new ranks", process)
        before = latest.stat().st_mtime_ns
        wait_until(lambda: latest.stat().st_mtime_ns != before, "another checkpoint", process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75
    assert errors.count("warning: a rank crashed: starting all again, 0 restarts left.") == 1
    assert "Traceback" not in errors and errors.splitlines()[-1].startswith("interrupted: ")


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks that a launcher has started, by rank."""
    time.sleep(0.05)
    found = {}
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(launcher.pid).children():
            with contextlib.suppress(psutil.Error):
                if "RANK" in (variables := child.environ()):
                    found[int(variables["RANK"])] = child
    return [found[rank] for rank in sorted(found)]

"""sepllm watch from the command line."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sepllm_train.watch.server import Server
from sepllm_train.watch.watch import Watch
from tests.support.command import command
from tests.support.waiting import HANG_SECONDS
from tests.watch.conftest import GrowingRun

main = command("watch")

NewRun = Callable[..., GrowingRun]


@contextmanager
def started(repository: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The program, started as a user does."""
    words = [sys.executable, "-m", "sepllm_train", "watch", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": f"{repository}{os.pathsep}{repository / 'kernels'}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def test_it_serves_until_ctrl_c(new_run: NewRun, repository: Path) -> None:
    run = new_run("one")
    run.train(1, 5)
    with started(repository, run.folder, "--port", 0, "--flops", "paper") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = re.fullmatch(r"Watching 1 run at (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", line)
        assert url is not None, line
        with urllib.request.urlopen(url[1] + "settings") as answer:
            assert b'"flops": "paper"' in answer.read()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, output.strip(), errors) == (0, "", "")


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which the program refuses `arguments`."""
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: ") and told.err.count("\n") == 1
    return told.err


def test_a_port_in_use_is_one_sentence(new_run: NewRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run("one")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        told = refused([str(run.folder), "--port", str(port)], capsys)
    assert f"Cannot serve at --host 127.0.0.1 --port {port}: Address already in use." in told


@pytest.mark.parametrize(
    "options", [["--port", "70000"], ["--port", "-1"], ["--host", "no.such.host.invalid"], ["--host", "::x"]]
)
def test_addresses_that_cannot_be(new_run: NewRun, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "Cannot serve at --host" in refused([str(new_run("one").folder), *options], capsys)


def test_folders_that_are_none_or_twice(new_run: NewRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run("one")
    assert "is not a folder" in refused([str(run.folder), str(tmp_path / "none")], capsys)
    (tmp_path / "link").symlink_to(run.folder)
    assert "is the same run as" in refused([str(run.folder), str(tmp_path / "link")], capsys)


def test_a_folder_of_runs_stands_for_the_runs_in_it(new_run: NewRun, repository: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        new_run(name).train(1, 5)
    with started(repository, tmp_path, "--port", 0) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Watching 2 runs at ")


def test_output_and_serve_exclude_one_another(new_run: NewRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(new_run("one").folder)
    for command_of_runs, arguments in ((command("compare"), [run]), (main, [run, "--output", "x"])):
        with pytest.raises(SystemExit) as ended:
            command_of_runs(arguments)
        assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "are required: --output" in told and "unrecognized arguments: --output x" in told


def test_an_open_address_is_warned_of(new_run: NewRun, repository: Path) -> None:
    run = new_run("one")
    with started(repository, run.folder, "--host", "0.0.0.0", "--port", 0) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("warning: with --host 0.0.0.0 everyone who reaches this machine")
        url = process.stdout.readline().split()[4]
        request = urllib.request.Request(url.replace("0.0.0.0", "127.0.0.1"), headers={"Host": "node7.example:8765"})
        assert urllib.request.urlopen(request).status == 200


def test_ipv6(new_run: NewRun) -> None:
    try:
        server = Server(Watch([new_run("one").folder]), "::1", 0)
    except Exception as error:
        pytest.skip(f"no IPv6 here: {error}")
    with server:
        assert server.loopback and re.fullmatch(r"http://\[::1\]:\d+/", server.url)

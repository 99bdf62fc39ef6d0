"""Every command of docs/tutorial.md, typed one after the other in one folder, with fewer steps."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from data_prep.sample import sample_documents
from tests.docs.markdown import REPOSITORY, commands
from tests.support.free_ports import free_port
from tests.support.waiting import HANG_SECONDS

PAGE = "tutorial.md"
# What the test changes: the steps and, so that two may run at once, the port of the page.
FEWER = {"training.steps=200": "training.steps=3"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with books/, as the tutorial asks for: here the documentation of the installed Python."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "books").mkdir()
    for number, document in zip(range(400), sample_documents(), strict=False):
        (folder / "books" / f"{number}.txt").write_text(document.text, encoding="utf8")
    return folder


def words_of(page: str) -> list[list[str]]:
    """The commands of a page with the changes of FEWER."""
    return [[FEWER.get(word, word) for word in command.words] for command in commands() if command.page == page]


def run(words: list[str], folder: Path) -> str:
    """Run `sepllm ...` in a folder; gives what it printed. Fails with its output."""
    assert words[0] == "sepllm", f"the tutorial types {words[0]}, which this test does not know"
    command = [sys.executable, "-m", "sepllm_train", *words[1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def watch(words: list[str], folder: Path) -> None:
    """Open the page of `sepllm watch` once it answers, then stop it as Ctrl-C does."""
    port = free_port()
    command = [sys.executable, "-m", "sepllm_train", *words[1:], "--port", str(port)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + HANG_SECONDS
        while True:
            try:
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read().decode()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        os.kill(process.pid, signal.SIGINT)
        process.wait(HANG_SECONDS)
    assert "<html" in page


@pytest.mark.slow
def test_the_whole_tutorial(folder: Path) -> None:
    typed = words_of(PAGE)
    assert sum(word == "training.steps=3" for words in typed for word in words) == 3
    for words in typed:
        # The shell opens what stands for several files.
        words = [name for word in words for name in (expanded(word, folder) if "*" in word else [word])]
        if words[1] == "watch":
            watch(words, folder)
        else:
            run(words, folder)
    assert (folder / "runs/comparison/comparison.html").is_file()
    snippet = re.search(r"```python\n(.*?)```", (REPOSITORY / "docs" / PAGE).read_text(encoding="utf8"), re.DOTALL)
    assert snippet is not None
    subprocess.run([sys.executable, "-c", snippet[1]], cwd=folder, check=True, timeout=HANG_SECONDS)


def expanded(pattern: str, folder: Path) -> list[str]:
    """Paths in `folder` that a pattern stands for, as the shell gives them."""
    return sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))

"""Refresh of the page of `sepllm watch` while many long runs grow, over HTTP and in headless Chromium.

python -m benchmarks.watch [--runs 20] [--rows 100000] [--refreshes 30]

Writes run folders with records as the trainer writes them into a temporary folder, starts the real server, and appends
rows to every run before each refresh. Beside the wall clock, which other programs of the machine lengthen, it prints
the CPU time. Without chromium and chromedriver the browser's part is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chromium import Chromium, programs
from benchmarks.common import exit_with

BAR = 0.1
_COMPARABLE = {"data": {"corpus": "synthetic"}, "tokenizer": "none", "vocabulary": 50304, "sequence_length": 2048}
_TOKENS_PER_STEP = 524_288


class Growing:
    """A run folder whose metrics.jsonl grows."""

    def __init__(self, folder: Path, number: int, rows: int) -> None:
        self.path = folder / "metrics.jsonl"
        self.random = random.Random(number)
        self.share = 1.0 if number % 2 == 0 else 0.12 + 0.01 * number
        self.step = 0
        folder.mkdir()
        info = {"name": folder.name, "status": "running", "steps": 2 * rows, "comparable": _COMPARABLE}
        (folder / "run.json").write_text(json.dumps(info), encoding="utf8")
        self.grow(rows)

    def grow(self, rows: int) -> None:
        """Append records of the next steps; every 500th is followed by a validation."""
        lines = []
        for _ in range(rows):
            self.step += 1
            lines.append(json.dumps(self._record()) + "\n")
            if self.step % 500 == 0:
                lines.append(json.dumps(self._counters() | {"val/loss": self._loss(), "val/seconds": 20.5}) + "\n")
        with open(self.path, "a", encoding="utf8") as stream:
            stream.writelines(lines)

    def _loss(self) -> float:
        return 2.2 + 8.5 / (1 + self.step / 40) ** 0.45 + 0.05 * (1 - self.share)

    def _counters(self) -> dict[str, Any]:
        tokens = self.step * _TOKENS_PER_STEP
        flops = int(tokens * 1e9)
        seconds = self.step * (0.6 + 0.4 * self.share)
        shares = {"flops/model": int(flops * (0.8 + 0.2 * self.share)), "flops/dense": flops, "flops/paper": flops // 2}
        return {"step": self.step, "tokens": tokens, "seconds": seconds, **shares}

    def _record(self) -> dict[str, Any]:
        noise = self.random.gauss(0, 0.04)
        seconds = (0.6 + 0.4 * self.share) * (1 + abs(noise))
        return self._counters() | {
            "train/loss": self._loss() + noise,
            "train/grad_norm": 0.4 + noise,
            "train/lr": 3e-4 * (1 + math.cos(self.step / 1e5)),
            "train/tokens_per_second": _TOKENS_PER_STEP / seconds,
            "train/step_seconds": seconds,
            "train/attended_share": self.share,
            "train/skipped_steps": 0,
            "train/bad_steps": 0,
            "train/lost_workers": 0,
            "train/memory_bytes": 41_000_000_000,
            "train/data_wait_seconds": 0.0012,
            "train/plan_seconds": 0.0031,
            "train/forward_seconds": seconds / 3,
            "train/backward_seconds": seconds / 2,
            "train/optimizer_seconds": seconds / 8,
            "train/straggler_ratio": 1.01,
            "train/straggler_rank": 3,
            "train/mfu": 0.41,
        }


def main() -> None:
    """Print the times of refreshes and whether they are below the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="run folders (%(default)s)")
    parser.add_argument("--rows", type=int, default=100_000, help="training records of each (%(default)s)")
    parser.add_argument("--new", type=int, default=2, help="rows that each run has more at a refresh (%(default)s)")
    parser.add_argument("--refreshes", type=int, default=30, help="refreshes timed (%(default)s)")
    parser.add_argument("--height", type=int, default=1000, help="of the browser's window; 2200 shows all charts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for number in range(arguments.runs):
            runs.append(Growing(Path(folder) / f"run{number:02d}", number, arguments.rows))
            print(f"\rwrote {len(runs)} of {arguments.runs} runs", end="", file=sys.stderr, flush=True)
        size = sum(run.path.stat().st_size for run in runs)
        print(file=sys.stderr)
        print(f"{arguments.runs} runs of {arguments.rows:,} training records, {size / 1e6:,.0f} MB")
        with served(runs) as (url, process):
            _measure(runs, url, process, arguments)


@contextmanager
def served(runs: list[Growing]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Address and process of the real server over `runs`."""
    command = [sys.executable, "-m", "sepllm_train", "watch", *(str(run.path.parent) for run in runs), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise SystemExit("error: the server did not start")
            yield found[0], process
        finally:
            process.terminate()


def _measure(runs: list[Growing], url: str, process: subprocess.Popen[str], arguments: argparse.Namespace) -> None:
    begin = time.perf_counter()
    while (state := _state(url, ""))[1]["loading"]:
        time.sleep(0.2)
    seconds = time.perf_counter() - begin
    server = psutil.Process(process.pid)
    memory = server.memory_info().rss / 1e6
    print(
        f"first reading: {seconds:.1f} s, processor {_processor([server]):.1f} s; the server then has {memory:.0f} MB"
    )
    new, same = [], []
    busy = _processor([server])
    for _ in range(arguments.refreshes):
        for run in runs:
            run.grow(arguments.new)
        taken, state = _timed(url, state[1]["tag"])
        assert all(told["step"] == run.step for told, run in zip(state[1]["runs"], runs, strict=True))
        new.append(taken)
    busy = (_processor([server]) - busy) / arguments.refreshes
    for _ in range(arguments.refreshes):
        same.append(_timed(url, state[1]["tag"], unchanged=True)[0])
    print(f"state of {len(state[0]) / 1e6:.2f} MB for the page")
    _tell("server, every run has new rows", new, busy)
    _tell("server, nothing new (304)", same)
    if programs() is None:
        print("chromium and chromedriver are not installed: the browser's part is left out")
        return
    with Chromium(1400, arguments.height) as browser:
        _measure_browser(runs, url, browser, arguments.refreshes, arguments.new)


def _measure_browser(runs: list[Growing], url: str, browser: Chromium, refreshes: int, new: int) -> None:
    """Times of the page's own measures: "update" until all is drawn, "frame" until the frame of it is over."""
    browser.open(url)
    browser.await_true("return performance.getEntriesByName('frame').length > 0", seconds=60)
    latest = "return performance.getEntriesByName(args[0]).map((entry) => [entry.startTime, entry.duration])"
    update: list[float] = []
    frame: list[float] = []
    seen = browser.run(latest, "frame")[-1][0]
    busy = _processor(browser.processes())
    while len(frame) < refreshes:
        for run in runs:
            run.grow(new)
        while not (told := [t for t in browser.run(latest, "frame") if t[0] > seen]):
            time.sleep(0.25)
        seen = told[-1][0]
        frame.append(told[-1][1] / 1000)
        update.append(browser.run(latest, "update")[-1][1] / 1000)
    busy = (_processor(browser.processes()) - busy) / refreshes
    _tell("Chromium, update of the page", update)
    _tell("Chromium, update until its frame is done", frame, busy)


def _timed(url: str, since: str, unchanged: bool = False) -> tuple[float, tuple[bytes, dict[str, Any]]]:
    begin = time.perf_counter()
    state = _state(url, since, unchanged)
    return time.perf_counter() - begin, state


def _state(url: str, since: str, unchanged: bool = False) -> tuple[bytes, dict[str, Any]]:
    """Content and header of the state as the page gets them; `unchanged` expects that there is nothing new."""
    headers = {"If-None-Match": f'"{since}"'} if since else {}
    request = urllib.request.Request(f"{url}state?scale=linear&since={since}", headers=headers)
    try:
        with urllib.request.urlopen(request) as answer:
            content = answer.read()
    except urllib.error.HTTPError as error:
        assert unchanged and error.code == 304
        return b"", {}
    length = int.from_bytes(content[:4], "little")
    return content, json.loads(content[4 : 4 + length])


def _processor(processes: list[psutil.Process]) -> float:
    """Seconds that processes have kept processors busy."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def _tell(what: str, seconds: list[float], busy: float | None = None) -> None:
    """Print wall clocks and, with `busy`, the mean processor time."""
    middle, late = statistics.median(seconds), sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1]
    verdict = "below" if late < BAR else "above"
    processor = "" if busy is None else f", processor {1e3 * busy:.0f} ms"
    print(
        f"{what:<42} median {1e3 * middle:6.1f} ms, p95 {1e3 * late:6.1f} ms ({verdict} {1e3 * BAR:.0f} ms){processor}"
    )


if __name__ == "__main__":
    exit_with(main)

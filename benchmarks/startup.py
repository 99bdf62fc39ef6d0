"""Seconds until commands answer: help, mistakes in overrides, files that are missing.

python -m benchmarks.startup [--rounds 5]

A command runs in a process of its own, as a user starts it; interleaved rounds, the least CPU seconds of each (user and
system). An idle core waits for little else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

# Words -> bar in seconds.
CASES = {
    ("--help",): 0.3,
    ("pretrain", "--help"): 0.3,
    ("pretrain", "--keys"): 0.3,
    ("compare", "--help"): 0.3,
    ("evaluate", "--help"): 0.3,
    ("generate", "--help"): 0.3,
    ("stream", "score", "--help"): 0.3,
    ("suite", "--help"): 0.3,
    ("pretrain", "+experiment=demo_sepp"): 0.5,
    ("pretrain", "+experiment=demo_sep", "optim.lrr=1"): 0.5,
    ("pretrain", "+experiment=demo_sep", "data=prefixes", "data.prefixes=[nowhere]"): 0.5,
    ("suite", "+suite=paper", "suite.jops=2"): 0.5,
    ("compare", "nowhere", "elsewhere", "--output", "out"): 0.5,
    ("generate", "nowhere", "--prompt", "x"): 0.5,
    ("evaluate", "nowhere", "--tasks", "piqa"): 0.5,
    ("stream", "score", "nowhere", "--text", "nowhere.txt", "--output", "out"): 0.5,
    ("export", "nowhere", "out"): 0.5,
}


def main() -> None:
    """Print CPU and wall-clock seconds of each command, and its bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (%(default)s)")
    rounds = parser.parse_args().rounds
    found: dict[tuple[str, ...], list[tuple[float, float]]] = {words: [] for words in CASES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for words, seconds in found.items():
                seconds.append(measure(words, folder))
    for words, seconds in found.items():
        cpu, wall = (min(values) for values in zip(*seconds, strict=True))
        verdict = "met" if cpu <= CASES[words] else "missed"
        print(f"{cpu:.2f} s CPU, {wall:.2f} s in all (bar {CASES[words]}: {verdict})  sepllm {' '.join(words)}")


def measure(words: tuple[str, ...], folder: str) -> tuple[float, float]:
    """(CPU seconds, wall-clock seconds) of a command."""
    before, begun = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "sepllm_train", *words], cwd=folder, capture_output=True, check=False)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, time.perf_counter() - begun


if __name__ == "__main__":
    main()

"""Train the demonstration model with dense and with separator attention on the sample corpus, and compare.

python scripts/demo.py [--output demo]
"""

from __future__ import annotations

import check_environment  # noqa: F401

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

EXPERIMENTS = ("demo_dense", "demo_sep")


def main() -> None:
    """Run both experiments one after the other, then the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of runs and report (%(default)s)")
    output = parser.parse_args().output
    for experiment in EXPERIMENTS:
        # Earlier demonstrations are repeated, not continued.
        shutil.rmtree(output / experiment, ignore_errors=True)
        run("pretrain", f"+experiment={experiment}", f"run_root={output}")
    runs = [str(output / experiment) for experiment in EXPERIMENTS]
    run("compare", *runs, "--output", str(output / "comparison"))


def run(*words: str) -> None:
    """Run a command of sepllm; its failure ends this program with the same code."""
    print("\n$ " + " ".join(["sepllm", *words]), flush=True)
    code = subprocess.run([sys.executable, "-m", "sepllm_train", *words]).returncode
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()

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

SCRIPTS = Path(__file__).resolve().parent
EXPERIMENTS = ("demo_dense", "demo_sep")


def main() -> None:
    """Run both experiments one after the other, then the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of runs and report (%(default)s)")
    output = parser.parse_args().output
    for experiment in EXPERIMENTS:
        # Earlier demonstrations are repeated, not continued.
        shutil.rmtree(output / experiment, ignore_errors=True)
        run("pretrain.py", f"+experiment={experiment}", f"run_root={output}")
    runs = [str(output / experiment) for experiment in EXPERIMENTS]
    run("compare_runs.py", *runs, "--output", str(output / "comparison"))


def run(script: str, *arguments: str) -> None:
    """Run a script of this folder; its failure ends this program with the same code."""
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    print("\n$ " + " ".join(["python", f"scripts/{script}", *arguments]), flush=True)
    code = subprocess.run(command).returncode
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()

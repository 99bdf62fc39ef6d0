"""Train a small model five steps, dense and with separators, alone and tensor parallel; resume it; export it.

python scripts/smoke.py
python scripts/smoke.py --keep smoke

It shows in a minute or two that an environment can run the project. Warnings are shown. Exit code 1 where a program
fails, or where two processes train to other losses than one.
"""

from __future__ import annotations

import check_environment  # noqa: F401

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sepllm_train.base.console import duration

SCRIPTS = Path(__file__).resolve().parent
SMALL = (
    *("model.layers=2", "model.hidden=64", "model.heads=4", "model.ffn=128", "data.sequence_length=128"),
    *("training.validation_interval=5", "training.checkpoint_interval=5"),
)
STEPS = 5
# A program that takes longer hangs: ten times what the slowest takes on two idle cores.
PATIENCE_SECONDS = 300
# Two processes add partial sums in another order; over five steps of this model the losses differ by less than this.
TOLERANCE = 1e-4


class SmokeError(Exception):
    """One sentence on what failed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every part; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write there and keep it (default: removed)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            run_parts(folder.absolute())
        except SmokeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def run_parts(folder: Path) -> None:
    """Every part, in `folder`. Raises SmokeError."""
    common = [*SMALL, f"run_root={folder}"]
    pretrain = [sys.executable, str(SCRIPTS / "pretrain.py")]
    several = [sys.executable, "-m", "sepllm_train.distributed.torchrun", "--standalone", "--nproc-per-node=2"]
    steps = f"training.steps={STEPS}"
    dense = ["+experiment=demo_dense", "name=dense", steps]
    sep = ["+experiment=demo_sep", "name=sep", steps]
    tp2 = ["+experiment=demo_sep", "name=tp2", "parallel.tensor=2", steps]
    part(folder, "dense, 5 steps", [*pretrain, *common, *dense])
    part(folder, "separators, 5 steps", [*pretrain, *common, *sep])
    part(folder, "separators, TP2", [*several, pretrain[1], *common, *tp2])
    one, two = losses(folder / "sep"), losses(folder / "tp2")
    if len(one) != STEPS or any(abs(a - b) > TOLERANCE for a, b in zip(one, two, strict=True)):
        raise SmokeError(f"losses of one process {one} and of two {two} differ.")
    resumed = ["+experiment=demo_sep", "name=resumed", f"resume={folder / 'sep'}", f"training.steps={STEPS + 3}"]
    part(folder, "resume, 3 steps more", [*pretrain, *common, *resumed])
    if len(losses(folder / "resumed")) != 3:
        raise SmokeError(f"the resumed run has {len(losses(folder / 'resumed'))} steps, not 3.")
    export = [sys.executable, "-m", "sepllm_train", "export", str(folder / "resumed"), str(folder / "exported")]
    part(folder, "export", export)


def part(folder: Path, name: str, command: list[str]) -> None:
    """Run one program and report its seconds. Raises SmokeError with the end of what it printed."""
    started = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise SmokeError(f"{name}: not done after {duration(PATIENCE_SECONDS)}.") from None
    if done.returncode:
        raise SmokeError(f"{name}: exit code {done.returncode}.\n{(done.stdout + done.stderr)[-3000:]}")
    print(f"{name}: {duration(time.monotonic() - started)}", flush=True)
    for line in dict.fromkeys(line for line in done.stderr.splitlines() if "Warning" in line):
        print(f"  {line}", flush=True)


def losses(run: Path) -> list[float]:
    """Training losses of a run, step by step."""
    records = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf8").splitlines())
    return [record["train/loss"] for record in records if "train/loss" in record]


if __name__ == "__main__":
    raise SystemExit(main())

"""Time of the steps between evaluations, over that of the same run without evaluation.

python -m benchmarks.steps_between_evaluations --data-dir data [--rounds 6] [--steps 40] [OVERRIDE ...]

Trains demo_sep with and without PIQA every tenth step, in interleaved rounds in one process. A step's seconds are those
that the run logs, which leave evaluations out; the first steps of a run are not looked at. The ratio of a round is that
of the medians over the steps.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.common import check_positive, exit_with, interleaved
from sepllm_train.config.load import configuration_of
from sepllm_train.config.validate import validate
from sepllm_train.distributed.launch import Launch, device_of, launch_from_environment, model_parallel, reading_group

BAR, INTERVAL, WARM_UP = 1.01, 10, 5


def main() -> None:
    """Print the ratio of each round, their median, and that of the steps right behind an evaluation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, metavar="DIR", help="folder of piqa_validation.jsonl")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="rounds, after one to warm up")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="steps of each run that are timed")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="on top of +experiment=demo_sep")
    options = parser.parse_args()
    check_positive(options, "rounds", "steps")
    launch = launch_from_environment()
    evaluation = [
        "evaluation.tasks=[piqa]",
        f"evaluation.interval={INTERVAL}",
        "evaluation.limit=16",
        "evaluation.truncate=true",
        f"evaluation.data_dir={options.data_dir}",
    ]
    with reading_group(launch), tempfile.TemporaryDirectory() as folder:
        run = partial(seconds_of_steps, launch, Path(folder), options.steps + WARM_UP, options.overrides)
        found = interleaved({"with": partial(run, evaluation), "without": partial(run, [])}, options.rounds)
    pairs = list(zip(found["with"], found["without"], strict=True))
    ratios = [statistics.median(one) / statistics.median(other) for one, other in pairs]
    # The steps 11, 21, ... of a run come right behind an evaluation.
    behind = slice(INTERVAL - WARM_UP, None, INTERVAL)
    after = [statistics.median(one[behind]) / statistics.median(other[behind]) for one, other in pairs]
    median = statistics.median(ratios)
    print(f"with evaluation over without, by round: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
    print(f"median {median:.3f} (bar {BAR:.2f}: {'met' if median <= BAR else 'missed'})")
    print(f"of the steps right behind an evaluation: {statistics.median(after):.3f}")


_numbers = itertools.count()


def seconds_of_steps(launch: Launch, folder: Path, steps: int, overrides: list[str], more: list[str]) -> list[float]:
    """Seconds of each step behind the first ones of a run of demo_sep."""
    from sepllm_train.training.run import train

    name = f"run{next(_numbers)}"
    settings = [
        "+experiment=demo_sep",
        f"name={name}",
        f"run_root={folder}",
        f"training.steps={steps}",
        "training.validation_samples=0",
        "training.checkpoint_interval=0",
        "logging.interval=1",
    ]
    config = configuration_of([*settings, *overrides, *more])
    validate(config, 1)
    device = device_of(launch)
    with model_parallel(config, device), contextlib.redirect_stdout(io.StringIO()):
        train(config, launch, device)
    records = map(json.loads, (folder / name / "metrics.jsonl").read_text(encoding="utf8").splitlines())
    steps_of = {record["step"]: record["train/step_seconds"] for record in records if "train/step_seconds" in record}
    return [steps_of[step] for step in range(WARM_UP + 1, steps + 1)]


if __name__ == "__main__":
    exit_with(main)

"""Seconds that the steps wait for saving a checkpoint, and seconds that writing it takes.

python -m benchmarks.checkpoint --model demo --saves 6

Prints, for saving in the background and in step, the median over the saves after the first: seconds that the steps
wait (stall), seconds until the checkpoint is there, and its size. `--step-seconds` adds the stall as a share of a step.
One process; the optimizer's state is that after one update. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks.common import exit_with
from sepllm_train.config.load import configuration_of
from sepllm_train.config.schema import Config, TrainingConfig
from sepllm_train.distributed.launch import Launch, process_grid
from sepllm_train.training.checkpoint import Outcome, Saver
from sepllm_train.training.setup import build_training
from sepllm_train.training.state import TrainState


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="name of a file in configs/model (default: demo)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--saves", type=int, default=6, metavar="N", help="saves of each kind, the first not counted")
    parser.add_argument("--folder", type=Path, help="where to write (default: the folder for temporary files)")
    parser.add_argument("--step-seconds", type=float, help="duration of a step, to give the stall as a share of it")
    arguments = parser.parse_args()
    model = configuration_of([f"model={arguments.model}"]).model
    config = Config(model=model, training=TrainingConfig(precision=arguments.precision))
    with process_grid(config, Launch(rank=0, world_size=1, local_rank=0, by_torchrun=False)) as device:
        training = build_training(config, config.model.vocabulary or 4096, device)
        for chunk in training.chunks:
            for parameter in chunk.parameters():
                parameter.main_grad.normal_()
        training.optimizer.step()
        for background in (True, False):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                saver = Saver(Path(folder), training, {}, keep=1, kept=lambda step: False, background=background)
                outcomes = []
                for step in range(1, arguments.saves + 1):
                    saver.save(TrainState(step=step))
                    outcomes += saver.finish()
            print(line("in the background" if background else "in step", outcomes[1:], arguments.step_seconds))


def line(kind: str, outcomes: list[Outcome], step_seconds: float | None) -> str:
    """Medians of the saves of one kind."""
    stall = statistics.median(outcome.stall_seconds for outcome in outcomes)
    total = statistics.median(outcome.seconds for outcome in outcomes)
    size = outcomes[0].bytes / 1e6
    share = "" if step_seconds is None else f" = {stall / step_seconds:.2%} of a step of {step_seconds:g} s"
    written = f"written in {total:.2f} s | {size:,.0f} MB, {size / total:,.0f} MB/s"
    return f"{kind}: stall {stall * 1e3:.1f} ms{share} | {written}"


if __name__ == "__main__":
    exit_with(main)

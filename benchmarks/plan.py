"""Cost of the separator side-car and the attention plan beside a training step of demo_sep, in one process.

python -m benchmarks.plan [--steps 6] [OVERRIDE ...]

A step is timed whole; what separator attention adds to it - the classes and documents of the samples, the plan, the
pair counts and the plan's block layout - is timed apart on the same micro-batches. Prints the ratio and the bar.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from sep_attention import attended_pairs
from sep_attention.blocked import row_layouts

from benchmarks.common import exit_with, timed
from sepllm_train.config.load import configuration_of
from sepllm_train.config.schema import Config
from sepllm_train.data.corpus import open_corpus
from sepllm_train.data.loader import Batch, MicroBatchSampler, micro_batches
from sepllm_train.data.splits import build_datasets
from sepllm_train.distributed.launch import launch_from_environment, process_grid
from sepllm_train.model.pattern import AttentionPattern, resolve_pattern

BAR = 0.02


def main() -> None:
    """Print seconds per step, seconds for plan and data, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, help="steps timed (%(default)s)")
    parser.add_argument("overrides", nargs="*", help="configuration overrides on top of +experiment=demo_sep")
    arguments = parser.parse_args()
    config = configuration_of(["+experiment=demo_sep", *arguments.overrides])
    with process_grid(config, launch_from_environment()) as device:
        step, extra = measure(config, arguments.steps, device)
    print(f"step of {config.name}: {step:.3f} s (median of {arguments.steps})")
    print(f"separator data, plan, pair counts and block layout of a step: {extra * 1e3:.1f} ms")
    print(f"share of a step: {extra / step:.2%} (bar {BAR:.0%}: {'met' if extra / step <= BAR else 'missed'})")


def measure(config: Config, steps: int, device: torch.device) -> tuple[float, float]:
    """(median seconds of a step, median seconds of what separator attention adds outside of attention itself)."""
    from sepllm_train.training.setup import build_training
    from sepllm_train.training.step import Stepper

    corpus = open_corpus(config.data)
    dataset, _ = build_datasets(config, corpus)
    pattern = resolve_pattern(config.attention, config.model.layers)
    stepper = Stepper(config, pattern, build_training(config, corpus.vocabulary, device), device)
    training = config.training
    sampler = MicroBatchSampler(
        range((steps + 1) * training.global_batch), micro_batch=training.micro_batch, replica=0, replicas=1
    )
    count = training.global_batch // training.micro_batch
    batches = list(micro_batches(dataset, sampler, workers=0, device=device))
    iterator = iter(batches)
    whole = [timed(lambda: stepper.train([iterator], count, lambda number: None)) for _ in range(steps + 1)]
    groups = [batches[n : n + count] for n in range(0, len(batches), count)]
    plans = [timed(partial(prepare, pattern, group)) for group in groups]
    extra_data = statistics.median(
        timed(partial(side_car, dataset, range(n * training.global_batch, (n + 1) * training.global_batch)))
        for n in range(steps)
    )
    return statistics.median(whole[1:]), statistics.median(plans[1:]) + extra_data


def prepare(pattern: AttentionPattern, group: list[Batch]) -> None:
    """Plans of a step's micro-batches, their pair counts, and the block layout that the first layer makes."""
    for batch in group:
        plan = pattern.plan(batch["separator_class"], batch["document_start"])
        for layer in dict.fromkeys(pattern.layers):
            attended_pairs(plan, layer.window, layer.horizons)
            if plan.tier.device.type == "cpu":
                row_layouts(plan, layer.window, layer.horizons)


def side_car(dataset: object, numbers: range) -> None:
    """Read the samples of a step with their classes and documents."""
    for number in numbers:
        dataset[number]  # type: ignore[index]


if __name__ == "__main__":
    exit_with(main)

"""Times training steps with separator attention beside dense ones: same weights' shapes, tokens, process and moment.

    python -m benchmarks.training --output training.json
    python -m benchmarks.training --model pythia160m pythia410m --lengths 2048 8192 32768 --output training.json

Without --model a CPU takes pythia14m with 8,192 tokens of vocabulary in fp32 at 2,048 and 8,192 tokens, and a GPU
pythia160m, pythia410m and pythia1.4b in bf16 from 2,048 to 32,768. Both patterns train real models on the sample
corpus (or --data) through the loader, schedules and optimizer of a run. Rounds of a few steps are interleaved in
alternating order; the ratio is the median of the rounds' ratios. The dense baseline is the fastest library kernel that
attention.backend=auto finds: causal flash attention on a CPU, flash or cuDNN attention on a GPU. Further arguments are
overrides of the configuration, for both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import check_positive, exit_with, write_json
from sepllm_train.base.console import duration, say
from sepllm_train.base.errors import UserError
from sepllm_train.config.load import configuration_of
from sepllm_train.config.schema import Config
from sepllm_train.config.validate import validate
from sepllm_train.distributed.launch import Launch, launch_from_environment, process_grid
from sepllm_train.metrics.flops import peak_tflops

PATTERNS = ("dense", "sep")
# Sep over dense in tokens per second on a CPU that must be reached, by length; data_wait as a share of the step.
CPU_BARS = {2048: 1.15, 8192: 1.8}
DATA_WAIT_BAR = 0.01
CPU: dict[str, Any] = {"models": ["pythia14m"], "lengths": [2048, 8192], "precision": "fp32", "tokens": 1}
GPU: dict[str, Any] = {
    "models": ["pythia160m", "pythia410m", "pythia1.4b"],
    "lengths": [2048, 4096, 8192, 16384, 32768],
    "precision": "bf16",
    "tokens": 16384,
}
# Without --data the sample corpus gives the tokens, and this the vocabulary: Pythia's, or a small one on a CPU.
VOCABULARY = {"cpu": ["data.sample_vocabulary=8192"], "cuda": ["model.vocabulary=50277"]}


def main() -> None:
    """Entry point."""
    run(parse())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UserError for an output that cannot be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file of the results")
    parser.add_argument("--model", nargs="+", metavar="NAME", help="model configurations")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="TOKENS", help="sequence lengths")
    parser.add_argument("--window", type=int, default=64, help="attention.window of the separator runs (64)")
    parser.add_argument(
        "--micro-tokens", type=int, metavar="N", help="tokens of a micro-batch (1 sequence on a CPU, 16384)"
    )
    parser.add_argument("--step-tokens", type=int, metavar="N", help="tokens of a step (default: one micro-batch)")
    parser.add_argument(
        "--rounds", type=int, default=9, metavar="N", help="rounds that count, after one to warm up (9)"
    )
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="steps of a round (4)")
    parser.add_argument("--data", metavar="PREFIX", help="prepared data set (default: the sample corpus)")
    parser.add_argument("--skip-checkpoints", action="store_true", help="leave out what saving a checkpoint costs")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="dense bf16 peak of one device, for MFU")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="configuration of both")
    options = parser.parse_intermixed_args(arguments)
    check_positive(options, "rounds", "steps", "window", "micro_tokens", "step_tokens")
    folder = options.output.resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--output {options.output}: {folder} is not a folder that can be written to.")
    return options


def run(options: argparse.Namespace) -> None:
    """Time every model at every length and write the results as they come."""
    launch = launch_from_environment()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    default = GPU if kind == "cuda" else CPU
    cases = [
        (model, length)
        for model in options.model or default["models"]
        for length in options.lengths or default["lengths"]
    ]
    configs = {case: {p: configuration(options, *case, p, kind, launch.world_size) for p in PATTERNS} for case in cases}
    with process_grid(configs[cases[0]]["dense"], launch) as device:
        results: dict[str, Any] = {"settings": settings(options), "machine": machine(device), "results": []}
        for model, length in cases:
            row = time_case(configs[model, length], launch, device, options)
            results["results"].append({"model": model, "length": length, **row})
            if launch.main:
                write_json(options.output, results)
            say(line(model, length, row, device))


def configuration(
    options: argparse.Namespace, model: str, length: int, pattern: str, kind: str, world_size: int
) -> Config:
    """The checked configuration of one pattern. Raises UserError."""
    default = GPU if kind == "cuda" else CPU
    micro = max(1, (options.micro_tokens or default["tokens"]) // length)
    steps = (options.rounds + 1) * options.steps
    overrides = [
        f"model={model}",
        f"attention={pattern}",
        *([f"attention.window={options.window}"] if pattern == "sep" else []),
        *(["data=prefixes", f"data.prefixes=[{options.data}]"] if options.data else VOCABULARY[kind]),
        f"data.sequence_length={length}",
        f"training.steps={steps}",
        f"training.micro_batch={micro}",
        f"training.precision={default['precision']}",
        *options.overrides,
    ]
    config = configuration_of(overrides)
    replicas = world_size // config.parallel.processes
    if not any(override.startswith("training.global_batch=") for override in options.overrides):
        smallest = config.training.micro_batch * max(1, replicas)
        wanted = (options.step_tokens or 0) // length
        config.training.global_batch = max(1, wanted // smallest) * smallest
    validate(config, world_size)
    if config.training.curriculum:
        raise UserError("training.curriculum: every length is timed by itself, with --lengths; leave it out.")
    if config.training.batch_schedule:
        raise UserError(
            "training.batch_schedule: the steps that are timed have one batch, --step-tokens; leave it out."
        )
    return config


def time_case(
    configs: dict[str, Config], launch: Launch, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """Figures of both patterns at one length, or why there are none."""
    from sepllm_train.training.out_of_memory import is_out_of_memory
    from sepllm_train.training.rounds import build_timed_run, interleave

    try:
        models = {pattern: build_timed_run(config, launch.world_size, device) for pattern, config in configs.items()}
        began = time.perf_counter()
        for number in interleave([models[pattern] for pattern in PATTERNS], options.rounds, options.steps, device):
            left = (time.perf_counter() - began) / (number + 1) * (options.rounds - number)
            say(f"round {number}/{options.rounds}, about {duration(left)} left")
        figures = {pattern: figures_of(model, device, options) for pattern, model in models.items()}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"failure": "out of memory"}
    ratios = [dense / sep for dense, sep in zip(models["dense"].seconds, models["sep"].seconds, strict=True)]
    return {**figures, "ratio": statistics.median(ratios), "ratios": ratios}


def figures_of(model: Any, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds of one pattern, per step."""
    facts = model.facts
    seconds = statistics.median(model.seconds)
    tokens = facts.tokens_per_step
    pairs = model.pairs * facts.replicas // model.done
    counter = facts.counters[model.config.data.sequence_length]
    flops = counter.training(tokens, pairs)["flops/model"]
    peak = options.peak_tflops
    if peak is None and device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(device))
    devices = model.config.parallel.processes * facts.replicas
    parts = {part: statistics.median(parts[part] for parts in model.parts) for part in model.parts[0]}
    return {
        "backends": facts.backends,
        "micro_batch": model.config.training.micro_batch,
        "parameters": facts.parameters,
        "attended_share": counter.attended_share(tokens, pairs),
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "mfu": None if peak is None else flops / seconds / (peak * 1e12 * devices),
        "seconds": parts,
        "data_wait_share": parts["data_wait"] / seconds,
        "checkpoint_stall_seconds": None if options.skip_checkpoints else checkpoint_stall(model),
        "rounds": model.seconds,
    }


def checkpoint_stall(model: Any) -> float:
    """Seconds that the steps wait for a checkpoint of this model, which is really written."""
    from sepllm_train.training.checkpoint import Saver
    from sepllm_train.training.state import TrainState

    with tempfile.TemporaryDirectory() as folder:
        background = model.config.training.async_checkpoint
        saver = Saver(Path(folder), model.training, {}, keep=1, kept=lambda step: False, background=background)
        saver.save(TrainState(step=1))
        (outcome,) = saver.finish()
    return outcome.stall_seconds


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The command line in the results."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def machine(device: torch.device) -> dict[str, Any]:
    """Code, packages and machine."""
    from sepllm_train.training.run_folder import environment

    return {**environment(), "device": device.type, "cores": os.cpu_count()}


def line(model: str, length: int, row: dict[str, Any], device: torch.device) -> str:
    """One line of the table."""
    if "failure" in row:
        return f"{model} at {length:,} tokens: {row['failure']}"
    cells = []
    for pattern in PATTERNS:
        figures = row[pattern]
        parts = ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in figures["seconds"].items())
        stall = figures["checkpoint_stall_seconds"]
        saving = "" if stall is None else f" | checkpoint stall {1e3 * stall:.1f} ms"
        mfu = "" if figures["mfu"] is None else f", MFU {figures['mfu']:.1%}"
        cells.append(
            f"\n  {pattern:<5} {figures['tokens_per_second']:>11,.0f} tokens/s{mfu} | step "
            f"{1e3 * figures['step_seconds']:.1f} ms: {parts} | data wait {figures['data_wait_share']:.2%} "
            f"(bar {DATA_WAIT_BAR:.0%}){saving}"
        )
    bar = CPU_BARS.get(length) if device.type == "cpu" and model == "pythia14m" else None
    wanted = "" if bar is None else f" (bar {bar}x)"
    return f"{model} at {length:,} tokens: sep {row['ratio']:.2f}x dense{wanted}{''.join(cells)}"


if __name__ == "__main__":
    exit_with(main)

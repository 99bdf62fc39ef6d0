"""Time the steps of a suite's variants in interleaved rounds in one process, and write timing_LENGTH.json.

    python -m sepllm_train.suite.timing FOLDER LENGTH ROUNDS STEPS_OF_A_ROUND [PREFIX]

The suite starts it (under torchrun for several processes). Runs of a suite share their machine with each other and with
whatever else runs there: their own seconds do not compare. Steps of interleaved rounds do.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sepllm_train.base.console import duration, say
from sepllm_train.base.errors import exit_on_user_error
from sepllm_train.base.files import write_json
from sepllm_train.config.load import configuration_of
from sepllm_train.config.schema import Config
from sepllm_train.config.validate import validate
from sepllm_train.distributed.launch import Launch, launch_from_environment, process_grid
from sepllm_train.suite.plan import Plan, data_overrides, read_plan
from sepllm_train.training.run_folder import environment

if TYPE_CHECKING:
    from sepllm_train.training.rounds import TimedRun


def timing_file(folder: Path, length: int) -> Path:
    """File of the step times of the variants at a sequence length."""
    return folder / f"timing_{length}.json"


def main() -> None:
    """Entry point."""
    exit_on_user_error(lambda: _main(*sys.argv[1:]))


def _main(folder: str, length: str, rounds: str, steps: str, prefix: str | None = None) -> None:
    plan = read_plan(Path(folder))
    launch = launch_from_environment()
    configs = variant_configs(plan, int(length), prefix)
    with process_grid(next(iter(configs.values())), launch) as device:
        figures = time_variants(configs, int(rounds), int(steps), launch, device)
        if launch.main:
            content = {
                "length": int(length),
                "turns": int(rounds),
                "steps_of_a_turn": int(steps),
                "rows": figures,
                "machine": machine(),
            }
            write_json(timing_file(plan.folder, int(length)), content)
    for variant, own in figures.items():
        say(f"{variant}: {own['tokens_per_second']:,.0f} tokens/s")


def machine() -> dict[str, Any]:
    """Facts besides the code that the times depend on."""
    own = environment()
    device = own["gpu"] or f"{own['processor']}, {os.cpu_count()} cores"
    return {"device": device, "threads": own["threads"], "python": own["python"], "torch": torch.__version__}


def variant_configs(plan: Plan, length: int, prefix: str | None) -> dict[str, Config]:
    """Configuration of each variant's first seed at a length. Raises UserError."""
    configs: dict[str, Config] = {}
    for run in plan.runs:
        if run.length == length and run.variant not in configs:
            configs[run.variant] = configuration_of([*run.overrides, *data_overrides(prefix)])
    for config in configs.values():
        validate(config, plan.processes)
    return configs


def time_variants(
    configs: dict[str, Config], rounds: int, steps: int, launch: Launch, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Return the seconds of a step of each variant: the median over the rounds, and each round's.

    Of a run whose steps differ these are means over its steps, with the medians of each phase.
    """
    # Imported late: megatron-core takes seconds.
    from sepllm_train.training.rounds import build_timed_run, interleave

    timed = {variant: build_timed_run(config, launch.world_size, device) for variant, config in configs.items()}
    began = time.perf_counter()
    for number in interleave(list(timed.values()), rounds, steps, device):
        left = (time.perf_counter() - began) / (number + 1) * (rounds - number)
        say(f"round {number}/{rounds}, about {duration(left)} left")
    return {variant: figures_of(own) for variant, own in timed.items()}


def figures_of(timed: TimedRun) -> dict[str, Any]:
    """Figures of a variant as timing.json has them."""
    phases = timed.schedule.phases
    medians = [statistics.median(each) for each in zip(*timed.phase_seconds, strict=True)]
    seconds = statistics.fmean(medians, weights=[phase.steps for phase in phases])
    listed = [{"last": phase.last, "step_seconds": own} for phase, own in zip(phases, medians, strict=True)]
    return {
        "step_seconds": seconds,
        "tokens_per_second": timed.facts.tokens / phases[-1].last / seconds,
        "turns": timed.seconds,
        **({"phases": listed} if len(phases) > 1 else {}),
        "backends": timed.facts.backends,
    }


if __name__ == "__main__":
    main()

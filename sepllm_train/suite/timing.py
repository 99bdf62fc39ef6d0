"""Times the steps of a suite's rows in turns in one process, and writes timing.json.

    python -m sepllm_train.suite.timing FOLDER --length 2048 --turns 5 --steps 2 [--prefix PREFIX]

Runs of a suite share their machine with each other and with whatever else runs there: their own seconds do not
compare. Steps that are taken in turns do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra import compose, initialize_config_dir

from sepllm_train.base.console import duration, say
from sepllm_train.base.errors import exit_on_user_error
from sepllm_train.base.files import write_json
from sepllm_train.config.load import config_folder, register_schema, to_config
from sepllm_train.config.schema import Config
from sepllm_train.config.validate import validate
from sepllm_train.distributed.launch import Launch, launch_from_environment, process_grid
from sepllm_train.suite.plan import Plan, data_overrides, read_plan
from sepllm_train.training.run_folder import environment

if TYPE_CHECKING:
    from sepllm_train.training.rounds import TimedRun


def timing_file(folder: Path, length: int) -> Path:
    """Where the step times of the rows at a sequence length are."""
    return folder / f"timing_{length}.json"


def main() -> None:
    """Entry point."""
    exit_on_user_error(_main)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="folder of the suite")
    parser.add_argument("--length", type=int, required=True, help="sequence length")
    parser.add_argument("--turns", type=int, required=True, help="turns that count")
    parser.add_argument("--steps", type=int, required=True, help="steps of a turn")
    parser.add_argument("--prefix", help="dataset (default: the sample corpus)")
    options = parser.parse_args()
    plan = read_plan(options.folder)
    launch = launch_from_environment()
    configs = row_configs(plan, options.length, options.prefix)
    with process_grid(next(iter(configs.values())), launch) as device:
        rows = time_rows(configs, options.turns, options.steps, launch, device)
        if launch.main:
            content = {
                "length": options.length,
                "turns": options.turns,
                "steps_of_a_turn": options.steps,
                "rows": rows,
                "machine": machine(),
            }
            write_json(timing_file(plan.folder, options.length), content)
    for row, figures in rows.items():
        say(f"{row}: {figures['tokens_per_second']:,.0f} tokens/s")


def machine() -> dict[str, Any]:
    """What the times depend on beside the code."""
    own = environment()
    device = own["gpu"] or f"{own['processor']}, {os.cpu_count()} cores"
    return {"device": device, "threads": own["threads"], "python": own["python"], "torch": torch.__version__}


def row_configs(plan: Plan, length: int, prefix: str | None) -> dict[str, Config]:
    """Configuration of each row's first seed at a length. Raises UserError."""
    register_schema()
    configs = {}
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        for run in plan.runs:
            if run.length == length and run.row not in configs:
                configs[run.row] = to_config(compose("pretrain", [*run.overrides, *data_overrides(prefix)]))
    for config in configs.values():
        validate(config, plan.processes)
    return configs


def time_rows(
    configs: dict[str, Config], turns: int, steps: int, launch: Launch, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Seconds of a step of each row: the median over the turns, and each turn's; means over the steps of a run that
    differ, and the medians of each phase of a curriculum."""
    # Imported late: megatron-core takes seconds.
    from sepllm_train.training.rounds import build_timed_run, interleave

    rivals = {row: build_timed_run(config, launch.world_size, device) for row, config in configs.items()}
    began = time.perf_counter()
    for turn in interleave(list(rivals.values()), turns, steps, device):
        left = (time.perf_counter() - began) / (turn + 1) * (turns - turn)
        say(f"turn {turn}/{turns}, about {duration(left)} left")
    return {row: figures_of(rival) for row, rival in rivals.items()}


def figures_of(rival: TimedRun) -> dict[str, Any]:
    """What timing.json says of a row."""
    phases = rival.schedule.phases
    medians = [statistics.median(turns) for turns in zip(*rival.phase_seconds, strict=True)]
    seconds = statistics.fmean(medians, weights=[phase.steps for phase in phases])
    told = [{"last": phase.last, "step_seconds": own} for phase, own in zip(phases, medians, strict=True)]
    return {
        "step_seconds": seconds,
        "tokens_per_second": rival.facts.tokens_per_step / seconds,
        "turns": rival.seconds,
        **({"phases": told} if len(phases) > 1 else {}),
        "backends": rival.facts.backends,
    }


if __name__ == "__main__":
    main()

"""Suites from the command line: prepare the data, fix the plan, train its runs, time its rows, write the report."""

from __future__ import annotations

import subprocess
from pathlib import Path

from sepllm_train.config.load import compose_and_run
from sepllm_train.console import say
from sepllm_train.errors import UserError, exit_on_user_error
from sepllm_train.suite.config import Config
from sepllm_train.suite.evaluate import evaluate_runs
from sepllm_train.suite.export import export
from sepllm_train.suite.plan import Plan, fix_plan, folder_of, make_plan, read_plan
from sepllm_train.suite.prepare import prepare_data
from sepllm_train.suite.report import write_suite_report
from sepllm_train.suite.runner import command_of, environment, launcher, train_runs


def main() -> None:
    """Entry point of scripts/suite.py."""
    exit_on_user_error(lambda: compose_and_run(run_suite, "suite", "suite_schema", Config))


def run_suite(config: Config) -> None:
    """Do what suite.do asks for. Raises UserError for mistakes and for runs that failed."""
    suite, folder = config.suite, folder_of(config)
    if suite.dry_run:
        plan = make_plan(config, suite.prefix)
        for run in plan.selected(suite.only):
            say(" ".join(command_of(plan, run)))
        say(f"dry run: {len(plan.selected(suite.only))} runs; nothing was trained.")
        return
    if {"train", "time", "evaluate"} & set(suite.do):
        plan = make_plan(config, prepare_data(config, folder))
        fix_plan(plan)
    else:
        # A report needs what was recorded, not the data.
        plan = read_plan(folder)
    runs = plan.selected(suite.only)
    say(f"suite {suite.name}, size {suite.size}, in {folder}: {suite.question}")
    if "train" in suite.do:
        train_runs(plan, runs, suite.jobs)
    if "time" in suite.do:
        for length in dict.fromkeys(run.length for run in runs):
            _time(config, plan, length)
    if "evaluate" in suite.do:
        evaluate_runs(plan, runs, config.size.evaluation_tokens)
    if "report" in suite.do:
        say(f"report: {write_suite_report(plan)}")
    if suite.export is not None:
        export(plan, Path(suite.export).expanduser())


def _time(config: Config, plan: Plan, length: int) -> None:
    """Time the rows at a length in a process of its own, which has the machine's cores to itself."""
    size = config.size
    say(f"timing the rows at {length:,} tokens in turns: let nothing else run meanwhile")
    arguments = [str(plan.folder), f"--length={length}", f"--turns={size.timing_turns}", f"--steps={size.timing_steps}"]
    arguments += [] if plan.prefix is None else [f"--prefix={plan.prefix}"]
    command = [*launcher(plan.processes), "-m", "sepllm_train.suite.timing", *arguments]
    code = subprocess.run(command, env=environment(1, plan.processes), check=False).returncode
    if code:
        raise UserError(f"timing the rows at {length} tokens failed with code {code}.")

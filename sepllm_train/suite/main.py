"""Run of a suite: prepare the data, fix the plan, train its runs, time its variants, write the report."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from pathlib import Path

from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError
from sepllm_train.base.secrets import masked_words
from sepllm_train.config.load import configuration_of
from sepllm_train.suite.config import SuiteSettings
from sepllm_train.suite.evaluate import evaluate_runs
from sepllm_train.suite.export import export, is_study, unpack
from sepllm_train.suite.plan import Plan, data_overrides, fix_plan, folder_of, make_plan, read_json, read_plan
from sepllm_train.suite.prepare import data_prefix, prepare_data
from sepllm_train.suite.report import write_suite_report
from sepllm_train.suite.runner import command_of, environment, interruptible, launcher, train_runs
from sepllm_train.suite.timing import timing_file
from sepllm_train.training.preflight import check_config
from sepllm_train.training.run_folder import claim


def run_suite(config: SuiteSettings) -> None:
    """Do what suite.do asks for. Raises UserError for mistakes and for runs that failed, Interrupted at a signal."""
    suite, folder = config.suite, folder_of(config)
    if suite.dry_run:
        _dry_run(config, folder)
        return
    if not {"train", "time", "evaluate"} & set(suite.do):
        # A report needs what was recorded, not the data, and changes nothing that is being trained.
        if is_study(folder):
            _report_study(config, folder)
        else:
            _finish(config, read_plan(folder))
        return
    check_runs(make_plan(config, data_prefix(config, folder), read=False), made=not suite.text)
    with interruptible(), claim(folder):
        if is_study(folder):
            unpack(folder, folder)
        plan = make_plan(config, prepare_data(config, folder))
        fix_plan(plan)
        runs = plan.selected(suite.only)
        say(f"suite {suite.name}, size {suite.size}, in {folder}: {suite.question}")
        if "train" in suite.do:
            train_runs(plan, runs, suite.jobs)
        if "time" in suite.do:
            for length in dict.fromkeys(run.length for run in runs):
                _time(config, plan, length)
        if "evaluate" in suite.do:
            evaluate_runs(plan, runs, config.size.evaluation_tokens)
        _finish(config, plan)


def _dry_run(config: SuiteSettings, folder: Path) -> None:
    """Print the commands of the runs."""
    plan = make_plan(config, data_prefix(config, folder), read=False)
    check_runs(plan, made=not config.suite.text)
    runs = plan.selected(config.suite.only)
    for run in runs:
        say(shlex.join(masked_words(command_of(plan, run))))
    say(f"dry run: {len(runs)} runs; nothing was trained.")


def check_runs(plan: Plan, *, made: bool) -> None:
    """Check every variant at every length as a run of its own does when it starts; `made`: the data is there.

    Raises UserError, which names the first run that would be refused.
    """
    for run in plan.runs:
        if run.seed != plan.seeds[0]:
            continue
        try:
            config = configuration_of([*run.overrides, *data_overrides(plan.prefix)])
            check_config(config, plan.processes, data=made)
        except UserError as error:
            raise UserError(f"the run {run.name} of the suite would be refused: {error}") from None


def _finish(config: SuiteSettings, plan: Plan) -> None:
    """Report and export."""
    if "report" in config.suite.do:
        say(f"report: {write_suite_report(plan)}")
    if config.suite.export is not None:
        export(plan, Path(config.suite.export).expanduser(), config.suite.figures)


def _report_study(config: SuiteSettings, study: Path) -> None:
    """Report and export of a study, whose own report and figures are written again."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / study.name
        unpack(study, folder)
        plan = read_plan(folder)
        _finish(config, plan)
        if "report" in config.suite.do:
            export(plan, study, config.suite.figures)


def _time(config: SuiteSettings, plan: Plan, length: int) -> None:
    """Time the variants at a length in a process of its own, unless they were timed before in as many rounds."""
    size, path = config.size, timing_file(plan.folder, length)
    asked = {"turns": size.timing_rounds, "steps_of_a_turn": size.timing_steps}
    if asked.items() <= read_json(path).items():
        say(f"the variants at {length:,} tokens were timed before; delete {path} to time them again")
        return
    say(f"timing the variants at {length:,} tokens in interleaved rounds: let nothing else run meanwhile")
    arguments = [str(plan.folder), str(length), str(size.timing_rounds), str(size.timing_steps)]
    arguments += [] if plan.prefix is None else [plan.prefix]
    command = [*launcher(plan.processes), "-m", "sepllm_train.suite.timing", *arguments]
    with subprocess.Popen(command, env=environment(1, plan.processes)) as process:
        try:
            code = process.wait()
        finally:
            process.terminate()
    if code:
        raise UserError(f"timing the variants at {length} tokens failed with code {code}.")

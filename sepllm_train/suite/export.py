"""A copy of a suite's figures to keep: plan, metrics, timings and report, without checkpoints and without what names
the machine's folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import write_json, write_whole
from sepllm_train.suite.evaluate import FILE as EVALUATIONS
from sepllm_train.suite.plan import FILE, Plan, read_json
from sepllm_train.suite.report import SHARES
from sepllm_train.suite.runner import finished
from sepllm_train.suite.timing import timing_file

# Of environment.json, what says where a run was and not what it was.
LOCAL = ("command", "host")


def export(plan: Plan, target: Path) -> None:
    """Copy the figures of the finished runs to `target`, from which a report can be made again.

    Raises UserError when `target` cannot be written.
    """
    if target.resolve().is_relative_to(plan.folder.resolve()):
        raise UserError(f"suite.export={target} is inside the suite's own folder: choose another one.")
    try:
        (target / "runs").mkdir(parents=True, exist_ok=True)
        done = [run for run in plan.runs if finished(plan, run)]
        for run in done:
            _export_run(plan.run_root / run.name, target / "runs" / run.name)
        write_whole(target / FILE, (plan.folder / FILE).read_bytes())
        for name in (SHARES, EVALUATIONS):
            if (plan.folder / name).exists():
                write_whole(target / name, (plan.folder / name).read_bytes())
        for path in (timing_file(plan.folder, length) for length in plan.lengths):
            if path.exists():
                write_whole(target / path.name, path.read_bytes())
        if (plan.folder / "report").is_dir():
            shutil.copytree(plan.folder / "report", target / "report", dirs_exist_ok=True)
    except OSError as error:
        raise UserError(
            f"suite.export={target} cannot be written ({error.strerror or error}): choose another folder."
        ) from None
    say(f"exported {len(done)} runs to {target}")


def _export_run(source: Path, target: Path) -> None:
    """Copy the records of one run."""
    target.mkdir(exist_ok=True)
    write_whole(target / "metrics.jsonl", (source / "metrics.jsonl").read_bytes())
    run = {**read_json(source / "run.json"), "origin": None}
    write_json(target / "run.json", run, indent=2)
    kept = {key: value for key, value in read_json(source / "environment.json").items() if key not in LOCAL}
    write_json(target / "environment.json", kept)
    config = yaml.safe_load((source / "config.yaml").read_text(encoding="utf8"))
    config["run_root"] = "runs"
    for key in ("prefixes", "validation_prefixes"):
        config["data"][key] = [Path(prefix).name for prefix in config["data"].get(key, [])]
    config["data"]["cache"] = None
    write_whole(target / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())

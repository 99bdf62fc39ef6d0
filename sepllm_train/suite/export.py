"""A study to keep or to publish: a suite's figures without data, checkpoints and the machine's paths.

README.md       question, command, commit, machine; written once, to be edited
report.md       the report, with LENGTH/comparison.md and SVG figures beside it
summary.json    plan, attended shares, evaluations, timings, and the figures of the report
runs.jsonl.gz   one run a line: name, config, environment, run.json and metrics
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import yaml

from data_prep.files import write_whole
from sepllm_train.console import say
from sepllm_train.errors import UserError
from sepllm_train.suite.evaluate import FILE as EVALUATIONS
from sepllm_train.suite.plan import FILE, Plan, read_json
from sepllm_train.suite.report import SHARES
from sepllm_train.suite.runner import finished
from sepllm_train.suite.timing import timing_file

RUNS, SUMMARY, README = "runs.jsonl.gz", "summary.json", "README.md"
# Of environment.json, what says where a run was and not what it was.
LOCAL = ("command", "host")


def export(plan: Plan, target: Path) -> None:
    """Write the finished runs of a suite to `target` as a study, from which a report can be made again.

    Raises UserError when `target` cannot be written.
    """
    if target.resolve().is_relative_to(plan.folder.resolve()):
        raise UserError(f"suite.export={target} is inside the suite's own folder: choose another one.")
    runs = [_record(plan.run_root / run.name) for run in plan.runs if finished(plan, run)]
    timings = {path.name: read_json(path) for path in (timing_file(plan.folder, length) for length in plan.lengths)}
    files = {name: read_json(plan.folder / name) for name in (FILE, SHARES, EVALUATIONS)} | timings
    report = plan.folder / "report"
    summary = {
        "files": {name: held for name, held in files.items() if held},
        "report": read_json(report / "report.json"),
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_whole(target / RUNS, packed(runs))
        write_whole(target / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
        for path in sorted(report.rglob("*")):
            if path.suffix in (".md", ".svg"):
                copy = target / path.relative_to(report)
                copy.parent.mkdir(exist_ok=True)
                write_whole(copy, path.read_bytes())
        if not (target / README).exists():
            write_whole(target / README, _readme(plan, runs).encode())
    except OSError as error:
        raise UserError(
            f"suite.export={target} cannot be written ({error.strerror or error}): choose another folder."
        ) from None
    say(f"exported {len(runs)} runs to {target}")


def is_study(folder: Path) -> bool:
    """Whether `folder` holds an exported study and not a suite (or an export of older versions, which is laid out as
    a suite)."""
    return (folder / RUNS).exists() and not (folder / FILE).exists()


def unpack(study: Path, folder: Path) -> None:
    """Write the plan, shares, evaluations, timings and runs of a study to `folder`, as a suite lays them out.

    Raises UserError when the study cannot be read.
    """
    files = read_json(study / SUMMARY).get("files", {})
    try:
        runs = [json.loads(line) for line in gzip.decompress((study / RUNS).read_bytes()).splitlines()]
        for run in runs:
            place = folder / "runs" / run["name"]
            place.mkdir(parents=True, exist_ok=True)
            write_whole(place / "config.yaml", yaml.safe_dump(run["config"], sort_keys=False).encode())
            write_whole(place / "environment.json", (json.dumps(run["environment"], indent=1) + "\n").encode())
            write_whole(place / "run.json", (json.dumps(run["run"], indent=2) + "\n").encode())
            write_whole(place / "metrics.jsonl", "".join(json.dumps(one) + "\n" for one in run["metrics"]).encode())
        # The plan last: with it, the folder is a suite.
        for name in reversed(files):
            write_whole(folder / name, (json.dumps(files[name], indent=1) + "\n").encode())
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{study / RUNS} cannot be unpacked ({error}): restore it.") from None


def packed(runs: list[dict[str, Any]]) -> bytes:
    """runs.jsonl.gz: the same bytes for the same runs."""
    return gzip.compress("".join(json.dumps(run) + "\n" for run in runs).encode(), mtime=0)


def _record(source: Path) -> dict[str, Any]:
    """The records of one run."""
    config = yaml.safe_load((source / "config.yaml").read_text(encoding="utf8"))
    config["run_root"] = "runs"
    for key in ("prefixes", "validation_prefixes"):
        config["data"][key] = [Path(prefix).name for prefix in config["data"].get(key, [])]
    config["data"]["cache"] = None
    environment = read_json(source / "environment.json")
    return {
        "name": source.name,
        "config": config,
        "environment": {key: value for key, value in environment.items() if key not in LOCAL},
        "run": {**read_json(source / "run.json"), "origin": None},
        "metrics": [json.loads(line) for line in (source / "metrics.jsonl").read_text(encoding="utf8").splitlines()],
    }


def _readme(plan: Plan, runs: list[dict[str, Any]]) -> str:
    """What the records tell of a study; the data has no name in them but its hash."""
    environments = [run["environment"] for run in runs]
    commits = sorted({(one.get("git") or {}).get("commit", "none")[:12] for one in environments})
    machines = sorted(
        {
            f"{one['gpu'] or one['processor']}, Python {one['python']}, torch {one['packages']['torch']}"
            for one in environments
        }
    )
    command = f"python scripts/suite.py +suite={plan.suite} suite.size={plan.size}"
    return (
        f"# {plan.suite}, size {plan.size}\n\n"
        f"Question: {plan.question}\n\nCommit: {', '.join(commits)}\n\nMachine: {'; '.join(machines)}\n\n"
        f"Data: tokens with SHA-256 {plan.data}\n\n"
        f"```bash\n{command} 'suite.lengths={plan.lengths}' 'suite.seeds={plan.seeds}'\n```\n\n"
        "| file | content |\n|---|---|\n"
        "| [report.md](report.md) | report; comparison and figures of each sequence length in the folder of its name |\n"
        "| `summary.json` | plan, attended shares, evaluations, timings, and the figures of the report |\n"
        f"| `runs.jsonl.gz` | {len(runs)} runs, one a line: configuration, environment, run.json, metrics |\n"
    )

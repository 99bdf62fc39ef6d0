"""Studies: a suite's results to keep or to publish, without data, checkpoints and paths of the machine.

README.md       question, commit, machine, command; never overwritten, so that it can be edited
report.md       the report; comparison.md and some SVG figures of each sequence length are in the folder of that length
summary.json    plan, attended fractions, evaluations, timings, all numbers of the report
runs.jsonl.gz   one run per line: name, config, environment, run.json, metrics
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import write_json, write_whole
from sepllm_train.base.parsing import parse_json_object, read_yaml
from sepllm_train.base.secrets import masked_values
from sepllm_train.config.stored import to_yaml
from sepllm_train.suite.evaluate import FILE as EVALUATIONS
from sepllm_train.suite.plan import FILE, Plan, finished, read_json
from sepllm_train.suite.report import SHARES
from sepllm_train.suite.timing import timing_file

RUNS, SUMMARY, README = "runs.jsonl.gz", "summary.json", "README.md"
# Of environment.json, what says where a run was and not what it was.
LOCAL = ("command", "host")


def export(plan: Plan, target: Path, figures: Sequence[str]) -> None:
    """Write the finished runs of a suite to `target` as a study, from which its report can be made again.

    Of the report's figures it holds those in `figures`; those that are there already are drawn again.
    Raises UserError when `target` cannot be written.
    """
    if target.resolve().is_relative_to(plan.folder.resolve()):
        raise UserError(f"suite.export={target} is inside the suite's own folder: choose another one.")
    runs = [_record(plan.run_root / run.name) for run in plan.runs if finished(plan, run)]
    report = plan.folder / "report"
    files = [plan.folder / name for name in (FILE, SHARES, EVALUATIONS)]
    files += [*(timing_file(plan.folder, length) for length in plan.lengths), report / "report.json"]
    summary = {path.stem: content for path in files if (content := read_json(path))}
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_whole(target / RUNS, packed(masked_values(runs)))
        write_json(target / SUMMARY, masked_values(summary))
        for path in sorted(report.rglob("*")):
            copy = target / path.relative_to(report)
            if path.suffix == ".md" or (path.suffix == ".svg" and (path.stem in figures or copy.exists())):
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
    """True for an exported study, False for a suite's folder; exports of older versions are laid out as suites."""
    return (folder / RUNS).exists() and not (folder / FILE).exists()


def unpack(study: Path, folder: Path) -> None:
    """Write the plan, shares, evaluations, timings and runs of a study to `folder`, laid out as a suite.

    Raises UserError when the study cannot be read.
    """
    summary = {f"{Path(key).name}.json": held for key, held in read_json(study / SUMMARY).items() if key != "report"}
    try:
        for line in gzip.decompress((study / RUNS).read_bytes()).splitlines():
            run = parse_json_object(line, study / RUNS, "restore it", nan=True)
            place = folder / "runs" / Path(run["name"]).name
            place.mkdir(parents=True, exist_ok=True)
            write_whole(place / "config.yaml", to_yaml(run["config"]).encode())
            write_json(place / "environment.json", run["environment"])
            write_json(place / "run.json", run["run"], indent=2)
            write_whole(place / "metrics.jsonl", "".join(json.dumps(one) + "\n" for one in run["metrics"]).encode())
        # The plan last: with it, the folder is a suite.
        for name, held in reversed(summary.items()):
            write_json(folder / name, held)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{study / RUNS} cannot be unpacked ({error}): restore it.") from None


def packed(runs: list[dict[str, Any]]) -> bytes:
    """Content of runs.jsonl.gz; the same runs give the same bytes."""
    return gzip.compress("".join(json.dumps(run) + "\n" for run in runs).encode(), mtime=0)


def _record(source: Path) -> dict[str, Any]:
    """Everything that a run recorded, without paths of the machine."""
    remedy = "restore it, or train the run again"
    config = read_yaml(source / "config.yaml", remedy)
    data = config.get("data")
    if not isinstance(data, dict):
        raise UserError(f"{source / 'config.yaml'} has no mapping data: {remedy}.")
    config["run_root"], data["cache"] = "runs", None
    for key in data.keys() & {"prefixes", "validation_prefixes"}:
        data[key] = [Path(prefix).name for prefix in data[key]]
    environment = read_json(source / "environment.json")
    return {
        "name": source.name,
        "config": config,
        "environment": {key: value for key, value in environment.items() if key not in LOCAL},
        "run": {**read_json(source / "run.json"), "origin": None},
        "metrics": [json.loads(line) for line in (source / "metrics.jsonl").read_text(encoding="utf8").splitlines()],
    }


def _readme(plan: Plan, runs: list[dict[str, Any]]) -> str:
    """README.md as far as the records give it: the data is known by its hash."""
    environments = [run["environment"] for run in runs]
    commits = sorted({(one.get("git") or {}).get("commit", "none")[:7] for one in environments})
    machines = sorted({f"{one['gpu'] or one['processor']}, torch {one['packages']['torch']}" for one in environments})
    lengths, seeds = (",".join(map(str, values)) for values in (plan.lengths, plan.seeds))
    command = f"sepllm suite +suite={plan.suite} suite.size={plan.size}"
    return f"""# Suite {plan.suite}, size {plan.size}

Question: {plan.question}

Commit: {", ".join(commits)}

Machine: {"; ".join(machines)}

Data: tokens with SHA-256 {plan.data}

```bash
{command} 'suite.lengths=[{lengths}]' 'suite.seeds=[{seeds}]'
```

| file | content |
|---|---|
| [report.md](report.md) | report; the folder of each sequence length has its comparison and figures |
| `summary.json` | plan, attended fractions, evaluations, timings, all numbers of the report |
| `runs.jsonl.gz` | {len(runs)} runs, one per line: configuration, environment, run.json, metrics |

Loss against seconds and tokens is drawn from the stored runs, by a command typed in this folder:

```bash
{command} suite.root=.. 'suite.do=[report]' 'suite.figures=[loss_vs_seconds,loss_vs_tokens]'
```
"""

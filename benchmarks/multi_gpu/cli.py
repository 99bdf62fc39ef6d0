"""Command line of the check of several GPUs."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.multi_gpu.cases import PRECISIONS, STAGES, Case, Scale, all_cases, cpu_scale, gpu_scale
from benchmarks.multi_gpu.kit import Kit
from benchmarks.multi_gpu.report import render
from benchmarks.multi_gpu.results import FAILED, SKIPPED, Results, code_fingerprint, machine_fingerprint
from benchmarks.multi_gpu.verdicts import BARS
from data_prep.sample import cache_folder
from sepllm_train.base.errors import EXIT_USER_ERROR, UserError
from sepllm_train.cli.environment import facts as machine_facts


def main(description: str, arguments: Sequence[str] | None = None) -> int:
    """Run the kit: 0 when no case failed, 1 when one did, 2 after a user's mistake, 130 after Ctrl-C."""
    options = parser(description).parse_args(arguments)
    try:
        return run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("\ninterrupted: finished cases are kept, the same command continues.", file=sys.stderr)
        return 130


def parser(description: str) -> argparse.ArgumentParser:
    """Options of the program."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--output", type=Path, default=Path("multi_gpu_check"), metavar="DIR", help="folder of results")
    result.add_argument("--gpus", type=int, metavar="N", help="GPUs to use, rounded down to a power of two (all)")
    result.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=", ".join(STAGES))
    result.add_argument("--budget-minutes", type=float, default=20.0, metavar="M", help="time to plan for (20)")
    result.add_argument("--again", action="store_true", help="run finished cases again")
    result.add_argument("--model", default="pythia160m", metavar="NAME", help="model that is timed (%(default)s)")
    rehearsal = "a rehearsal with CPU processes over gloo: checks the kit, not the GPUs"
    result.add_argument("--cpu", action="store_true", help=rehearsal)
    return result


def run(options: argparse.Namespace) -> int:
    """Plan, run, report. Raises UserError."""
    if not options.budget_minutes > 0:
        raise UserError(f"--budget-minutes {options.budget_minutes} must be above 0.")
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    output = options.output.resolve()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --output {options.output}: {error.strerror}.") from None
    facts = machine_facts(output, cache_folder())
    processes = usable(options, facts)
    scale = cpu_scale() if options.cpu else gpu_scale(smallest_memory(facts), options.model)
    cases = [case for case in all_cases(processes, scale) if case.stage in options.stages]
    device = f"{scale.device} {processes}"
    results = Results(output / "results.json", code_fingerprint(), machine_fingerprint(facts, device))
    results.header = header(options, facts, scale, processes)
    results.load()
    discard(results, cases, options.again)
    for name, value in results.header["summary"].items():
        print(f"{name}: {value}")
    Kit(output, cases, results, scale, facts, 60 * options.budget_minutes).run()
    return finish(output, results, cases)


def usable(options: argparse.Namespace, facts: dict[str, Any]) -> int:
    """Processes to start. Raises UserError for fewer than two GPUs, or fewer than asked for."""
    if options.gpus is not None and options.gpus < 2:
        raise UserError(f"--gpus {options.gpus} must be at least 2.")
    if options.cpu:
        found = options.gpus or 2
    else:
        found = int(facts["torch"]["gpus"])
        if found < 2:
            names = "; ".join(facts["gpu"]["devices"])
            text = (
                f"no GPU (nvidia-smi lists {names})"
                if names and not found
                else f"one GPU ({names})"
                if found
                else "no GPU"
            )
            raise UserError(
                f"two or more GPUs are needed, torch finds {text}: run this on a machine with several, see "
                "`sepllm env` if there are, or rehearse with --cpu, which checks the kit and not the GPUs."
            )
        if options.gpus is not None and options.gpus > found:
            raise UserError(f"--gpus {options.gpus}: torch finds {found}; give at most that many.")
        found = options.gpus or found
    return 1 << (found.bit_length() - 1)


def smallest_memory(facts: dict[str, Any]) -> int:
    """Bytes of the smallest GPU that nvidia-smi lists, 0 where it lists none.

    torch would have to open a GPU for that, which those in exclusive mode do not share with the runs.
    """
    sizes = [re.search(r", (\d+) MiB", name) for name in facts["gpu"]["devices"]]
    return min((int(size[1]) << 20 for size in sizes if size), default=0)


def header(options: argparse.Namespace, facts: dict[str, Any], scale: Scale, processes: int) -> dict[str, Any]:
    """Content of results.json besides the cases; `summary` is printed and part of the report."""
    # Imported late: it takes seconds, which a mistake on the command line should not cost.
    from sepllm_train.training.run_folder import git_state

    torch, packages = facts["torch"], facts["packages"]
    devices = facts["gpu"]["devices"] if scale.device == "cuda" else [facts["machine"]["processor"]]
    versions = {"torch": torch.get("version"), "CUDA": torch.get("cuda"), "NCCL": torch.get("nccl")}
    versions |= {
        name: packages.get(name) for name in ("megatron-core", "triton", "flash-attn", "transformer-engine", "apex")
    }
    git = git_state()
    commit = "unknown" if git is None else git["commit"][:12] + (" with changes" if git["changed"] else "")
    kinds = {name: devices.count(name) for name in devices}
    summary = {
        "machine": "; ".join(f"{count} x {name}" for name, count in kinds.items()),
        "used": f"{processes} {'GPUs over NCCL' if scale.device == 'cuda' else 'CPU processes over gloo'}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "code": commit,
        "bars": "; ".join(f"{name} losses {BARS[name][0]:.2g}, norms {BARS[name][1]:.2g}" for name in PRECISIONS)
        + ", relative",
    }
    return {
        "rehearsal": scale.device == "cpu",
        "processes": processes,
        "budget_minutes": options.budget_minutes,
        "timed_model": options.model if scale.device == "cuda" else "demo",
        "summary": summary,
    }


def discard(results: Results, cases: Sequence[Case], again: bool) -> None:
    """Keep the records of stages that are not run now, and those of finished cases unless they are run `again`.

    Others would be baselines of another code or machine.
    """
    stages = {case.stage for case in cases}
    kept = set() if again else {case.id for case in cases if results.finished(case)}
    results.cases = {
        id: record for id, record in results.cases.items() if id in kept or record.get("stage") not in stages
    }


def finish(output: Path, results: Results, cases: Sequence[Case]) -> int:
    """Write and print the report; gives the exit code."""
    order = {case.id: number for number, case in enumerate(cases)}
    results.cases = dict(sorted(results.cases.items(), key=lambda item: order.get(item[0], -1)))
    results.write()
    text = render(results.header, results.cases)
    (output / "report.md").write_text(text, encoding="utf8")
    print(f"\n{text}")
    statuses = [results.cases[case.id]["status"] for case in cases]
    if SKIPPED in statuses:
        print(
            f"{statuses.count(SKIPPED)} cases were left out: the same command runs them, and keeps those that passed."
        )
    if FAILED in statuses:
        print(f"{statuses.count(FAILED)} cases FAILED, see {output / 'logs'}: the same command tries them again.")
    print(f"Please send back this one file: {results.path}")
    return 1 if FAILED in statuses else 0

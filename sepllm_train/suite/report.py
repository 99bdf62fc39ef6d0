"""The report of a suite: for each sequence length a comparison of its variants, and one page of Markdown over all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import write_json, write_whole
from sepllm_train.compare.report import REFERENCE, Report, build_report, write_report
from sepllm_train.compare.results import find_sweep
from sepllm_train.compare.tables import Table
from sepllm_train.compare.timing import read_timing
from sepllm_train.compare.variants import Variant, points, read_variants, runs_of
from sepllm_train.runs.open import read_config
from sepllm_train.suite.evaluate import FILE as EVALUATIONS
from sepllm_train.suite.evaluate import PatternShares, shares_of
from sepllm_train.suite.plan import Plan, PlannedRun, finished, read_json
from sepllm_train.suite.timing import timing_file

SHARES = "shares.json"
KEPT = (
    "Attended: visible (query, key) pairs over those of the causal triangle. KV kept: keys that the last token of a "
    "sequence sees over all keys up to it. Both are means over held-out samples and layers. FLOPs of a token are those "
    "of training, over the first variant's, in the three conventions of docs/flops.md; where a run's steps differ, "
    "they are means over its steps, and the shares are those of validation."
)


def write_suite_report(plan: Plan) -> Path:
    """Compare the finished runs of each length, write the folder `report` and give its Markdown file.

    Raises UserError when no length has two variants to compare.
    """
    folder = plan.folder / "report"
    done = [run for run in plan.runs if finished(plan, run)]
    parts = [_head(plan, done)]
    figures: dict[str, Any] = {}
    for length in plan.lengths:
        runs = [run for run in done if run.length == length]
        if plan.reference not in {run.variant for run in runs} or len({run.variant for run in runs}) < 2:
            parts.append(f"## S = {length:,}\n\nNothing to compare yet: {len(runs)} runs are finished.\n")
            continue
        shares = _shares(plan, length)
        report = _compare(plan, length, runs)
        write_report(report, folder / str(length))
        table = _pattern_table(report, shares)
        parts.append(_section(length, report, [table, *_evaluation_table(plan, runs, report)]))
        figures[str(length)] = {
            "shares": {variant: asdict(found) for variant, found in shares.items()},
            **report.data(),
        }
    if not figures:
        raise UserError(
            f"{plan.folder} has nothing to compare: at some length the reference {plan.reference} and another variant "
            f"must be finished, and {len(done)} of {len(plan.runs)} runs are."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", figures)
    target = folder / "report.md"
    write_whole(target, "\n".join(parts).encode())
    return target


def _compare(plan: Plan, length: int, runs: Sequence[PlannedRun]) -> Report:
    """Comparison of the runs of one length, the reference first."""
    order = [plan.reference, *(variant for variant in plan.variants if variant != plan.reference)]
    sorted_runs = sorted(runs, key=lambda run: (order.index(run.variant), run.seed))
    notes: list[str] = []
    found = runs_of(read_variants([plan.run_root / run.name for run in sorted_runs], groups=False, warn=notes.append))
    # The plan says what a variant is: configurations also hold where the data was.
    variant_of = {run.name: run.variant for run in runs}
    gathered = {variant: [run for run in found if variant_of[run.folder.name] == variant] for variant in order}
    variants = _with_a_seed_in_common([Variant(variant, own) for variant, own in gathered.items() if own], notes)
    timing = timing_file(plan.folder, length)
    if not timing.exists() and find_sweep(variants) is None:
        notes.append(
            "The variants were not timed in interleaved rounds: seconds are those that the runs took beside each other "
            "and beside whatever else ran, and do not compare."
        )
    return build_report(
        variants,
        REFERENCE,
        title=f"{plan.suite} ({plan.size}), S = {length:,}",
        timing=read_timing(timing) if timing.exists() else None,
        notes=notes,
    )


def _with_a_seed_in_common(variants: list[Variant], notes: list[str]) -> list[Variant]:
    """The variants that share a seed with the first one: ratios are taken within a seed. `notes` gets what is left out.

    Raises UserError when that leaves the first one alone.
    """
    reference = {run.seed for run in variants[0].runs}
    kept = [variant for variant in variants if reference & {run.seed for run in variant.runs}]
    notes += [
        f"Left out: {variant.label} has no seed in common with {variants[0].label} yet."
        for variant in variants
        if variant not in kept
    ]
    if len(kept) < 2:
        raise UserError(f"no variant has a seed in common with {variants[0].label} yet: train more of the suite.")
    return kept


def _shares(plan: Plan, length: int) -> dict[str, PatternShares]:
    """PatternShares of each variant at a length, counted once and kept in the suite's folder."""
    path = plan.folder / SHARES
    stored = read_json(path)
    if not stored.get(str(length), {}).keys() >= _one_of_each(plan, length).keys():
        say(f"counting what the variants attend at {length:,} tokens")
        stored[str(length)] = {
            variant: asdict(shares_of(read_config(plan.run_root / name)))
            for variant, name in _one_of_each(plan, length).items()
        }
        write_json(path, stored)
    return {variant: PatternShares(**values) for variant, values in stored[str(length)].items()}


def _one_of_each(plan: Plan, length: int) -> dict[str, str]:
    """Name of a finished run of each variant at a length; the pattern does not depend on the seed."""
    return {run.variant: run.name for run in reversed(plan.runs) if run.length == length and finished(plan, run)}


def _pattern_table(report: Report, shares: dict[str, PatternShares]) -> Table:
    """Table of what each variant attends, keeps and costs, and of its loss at the tokens all share."""
    reference = shares[report.variants[0].label]
    lines = []
    for equal in report.equal:
        own = shares[equal.label]
        ratios = [f"{own.flops[key] / reference.flops[key]:.3f}x" for key in own.flops]
        change = equal.difference
        if equal is report.equal[0] or change is None:
            difference = "-"
        elif change.low is None or change.high is None:
            difference = f"{change.mean:+.4f}"
        else:
            difference = f"{change.mean:+.4f} ({change.low:+.4f} to {change.high:+.4f})"
        lines.append([equal.label, f"{equal.loss:.4f}", difference, f"{own.attended:.1%}", f"{own.kept:.1%}", *ratios])
    header = [
        "variant",
        "loss",
        "difference (95%)",
        "attended",
        "KV kept",
        *(f"{key} a token" for key in reference.flops),
    ]
    return Table(f"At {report.equal[0].tokens:,.0f} tokens, and what a token costs", header, lines)


def _head(plan: Plan, done: Sequence[PlannedRun]) -> str:
    """Title, and what was fixed and when: runs that were copied from another suite began before the plan."""
    stamp = read_json(plan.folder / "plan.json")
    fixed = stamp.get("fixed", "")
    commit = (stamp.get("git") or {}).get("commit", "no commit")
    environments = [read_json(plan.run_root / run.name / "environment.json") for run in done]
    states = [environment.get("git") or {} for environment in environments]
    trained_at = sorted({state.get("commit", "no commit")[:12] for state in states})
    changed = " (some with changes that are in no commit)" if any(state.get("changed") for state in states) else ""
    # Both are of the form 2026-01-31T12:00:00Z.
    earlier = sum(environment.get("started", fixed) < fixed for environment in environments)
    order = f"when {earlier} of its runs had begun" if earlier else "before the first run"
    return (
        f"# Suite {plan.suite}, size {plan.size}\n\n{plan.question}\n\n"
        f"The plan (data and its order, seeds {', '.join(map(str, plan.seeds))}, tokens of every run) was fixed on "
        f"{fixed} at commit {commit[:12]}, {order}. {len(done)} of its {len(plan.runs)} runs "
        f"are finished; the code was that of {', '.join(trained_at) or 'none'}{changed}.\n"
    )


def _evaluation_table(plan: Plan, runs: Sequence[PlannedRun], report: Report) -> list[Table]:
    """Losses of the last checkpoints, where they were evaluated: means over the seeds of each variant."""
    path = plan.folder / EVALUATIONS
    found = read_json(path)
    lines = []
    for variant in report.variants:
        own = [found[run.name] for run in runs if run.variant == variant.label and run.name in found]
        if own:
            losses = [f"{fmean(one[key] for one in own):.4f}" for key in ("loss", "far_recall_loss", "other_loss")]
            tokens = points(variant.runs[0])[-1]["tokens"]
            lines.append([variant.label, str(len(own)), f"{tokens:,.0f}", *losses, f"{own[0]['far_recall_share']:.1%}"])
    if not lines:
        return []
    held_out = next(iter(found.values()))["tokens"]
    header = ["variant", "seeds", "trained on", "loss", "far recall", "other tokens", "share of far recall"]
    return [Table(f"The last checkpoints on {held_out:,.0f} held-out tokens", header, lines)]


def _section(length: int, report: Report, tables: Sequence[Table]) -> str:
    """One length of the report."""
    notes = "".join(f"- {note}\n" for note in report.notes)
    reach = report.main_tables()[0]
    shown = "\n".join(table.markdown() for table in tables)
    return (
        f"## S = {length:,}\n\n{report.verdict}\n\n{notes}\n{shown}\n{KEPT}\n\n{reach.markdown()}\n"
        f"Curves, seeds and all other figures: [{length}/comparison.md]({length}/comparison.md).\n"
    )

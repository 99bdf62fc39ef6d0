"""The tables that are printed at the end and written to report.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.multi_gpu.cases import STAGES
from benchmarks.multi_gpu.results import PASSED, STATUSES

TITLES = {
    "environment": "Machine and all-reduce",
    "layouts": "Every layout against one GPU: largest relative difference of losses and gradient norms",
    "resume": "Stopped at a checkpoint and resumed",
    "kill": "Killed and stopped by signals, resumed each time",
    "overlap": "parallel.overlap off and on",
    "scaling": "Weak scaling of data parallelism",
    "throughput": "Layouts at the same number of GPUs, tokens per second and peak memory of a GPU",
}


def render(header: dict[str, Any], cases: dict[str, dict[str, Any]]) -> str:
    """The report in Markdown: the machine, a line of counts, a table for each stage."""
    lines = ["# Proof kit for several GPUs", ""]
    if header["rehearsal"]:
        lines += ["**A rehearsal with CPU processes over gloo: it checks the kit, not the GPUs.**", ""]
    lines += [f"- {name}: {value}" for name, value in header["summary"].items()] + [""]
    counts = {status: [id for id, case in cases.items() if case["status"] == status] for status in STATUSES}
    lines.append(", ".join(f"{len(ids)} {status}" for status, ids in counts.items()) + ".")
    for stage in STAGES:
        records = [record for record in cases.values() if record["stage"] == stage]
        if records:
            lines += ["", f"## {stage}: {TITLES[stage]}", "", *table(records)]
    return "\n".join(lines) + "\n"


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """Name, GPUs, status, result and seconds of the cases of a stage."""
    head = ("case", "processes", "status", "result", "seconds")
    rows = [
        (
            record["name"],
            str(record["processes"]),
            record["status"] if record["status"] == PASSED else record["status"].upper(),
            record["message"].replace("|", "/"),
            f"{record['seconds']:.1f}" if record.get("seconds") else "-",
        )
        for record in records
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    # A long message must not widen the rows of all others.
    widths[3] = min(widths[3], 80)
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    rule = "|".join("-" * (width + 2) for width in widths)
    return [f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]

"""sepllm env: versions, GPUs, memory, disks, limits, variables and an all-reduce, with advice."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from sepllm_train.cli import flags


def main(words: Sequence[str]) -> None:
    """Print the report, whatever it finds."""
    parser = flags.parser(
        "env",
        "Versions, GPUs, memory, disks, limits, variables and an all-reduce, with advice: attach it to a report of a\n"
        "fault. Of several nodes: python -m sepllm_train.distributed.torchrun --nproc-per-node=8 -m sepllm_train env",
    )
    add = parser.add_argument
    add("--run-root", type=Path, default=Path("runs"), help="where runs are written (runs)")
    add("--cache", type=Path, help="cache of the sample corpus and of indices (default: that of runs)")
    add("--json", action="store_true", help="as JSON")
    add("--no-self-test", action="store_true", help="leave the all-reduce out")
    add("--mebibytes", type=int, default=64, help="size of the all-reduce (64)")
    arguments = parser.parse_args(words)

    from data_prep.sample import cache_folder
    from sepllm_train.cli.environment import advice, facts, print_report, self_test

    found = facts(arguments.run_root, arguments.cache or cache_folder())
    if not arguments.no_self_test and not found["torch"].get("error"):
        found["self_test"] = self_test(arguments.mebibytes, found["torch"]["gpus"])
    if os.environ.get("RANK", "0") != "0":
        return
    if arguments.json:
        print(json.dumps({**found, "advice": advice(found)}, indent=2))
    else:
        print_report(found)

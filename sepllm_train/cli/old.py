"""Names of before the one program: for one release they name the new command on stderr and run it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sepllm_train.base.console import note
from sepllm_train.cli.main import main as sepllm

# Old script or console name, without .py, and the words of the new command.
NEW = {
    "sepllm-pretrain": "pretrain",
    "sepllm-prepare-data": "prepare",
    "sepllm-compare-runs": "compare",
    "analyze_separators": "analyze",
    "compare_runs": "compare",
    "dashboard": "dashboard",
    "env_report": "env",
    "evaluate": "evaluate",
    "export_hf": "export",
    "generate": "generate",
    "import_hf": "import",
    "kv_share": "evaluate kv",
    "match_interval": "match interval",
    "match_keep_share": "match keep-share",
    "prepare_data": "prepare",
    "probe": "probe",
    "report_eval": "evaluate report",
    "report_recovery": "analyze recovery",
    "stream": "stream",
    "suite": "suite",
}


def main(name: str | None = None, words: Sequence[str] | None = None) -> int:
    """Run what the old program `name` (default: that of the process) did with `words`; gives the exit code."""
    name = Path(sys.argv[0] if name is None else name).name.removesuffix(".py").removesuffix(".exe")
    words = list(sys.argv[1:] if words is None else words)
    command = NEW[name].split()
    if command == ["compare"] and "--serve" in words:
        command = ["watch"]
        words.remove("--serve")
    if command == ["analyze"] and words[:1] == ["attention"]:
        words = [word.replace("--separators", "--classes", 1) for word in words]
    note(f"{name} is now `sepllm {' '.join(command)}`; the old name goes with the next release.")
    return sepllm([*command, *words])


def run_process() -> None:
    """Entry point of the old console names."""
    sys.exit(main())

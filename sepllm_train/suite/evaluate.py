"""Evaluates the last checkpoints of a suite's runs on more held-out text than validation in training takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sepllm_train.base.console import duration, say
from sepllm_train.base.files import write_json
from sepllm_train.runs.evaluate import evaluate_run
from sepllm_train.runs.open import open_run
from sepllm_train.suite.plan import Plan, PlannedRun, read_json
from sepllm_train.suite.runner import finished

FILE = "evaluations.json"
# n of the far-recall tokens of every row: the paper's window.
RECALL_WINDOW = 64
# What is kept of an evaluation; the rest names folders.
KEPT = (
    "loss",
    "loss_error",
    "far_recall_loss",
    "far_recall_loss_error",
    "other_loss",
    "other_loss_error",
    "far_recall_share",
    "attended_share",
    "recall_window",
    "tokens",
)


def evaluate_runs(plan: Plan, runs: Sequence[PlannedRun], tokens: int) -> None:
    """Write evaluations.json with the losses of every finished run of `runs` on `tokens` held-out tokens.

    What was evaluated before on as many tokens, and was not trained anew since, is left as it is. Raises UserError for
    a run whose checkpoint is gone.
    """
    path = plan.folder / FILE
    found = read_json(path)

    def wanted(run: PlannedRun) -> dict[str, Any]:
        started = read_json(plan.run_root / run.name / "environment.json").get("started")
        return {"steps": run.steps, "asked": tokens, "started": started}

    waiting = [
        run for run in runs if finished(plan, run) and not wanted(run).items() <= found.get(run.name, {}).items()
    ]
    began = time.perf_counter()
    for number, run in enumerate(waiting, 1):
        trained = open_run(plan.run_root / run.name)
        result = evaluate_run(trained, max(1, tokens // run.length), recall_window=RECALL_WINDOW)
        found[run.name] = wanted(run) | {key: result[key] for key in KEPT}
        write_json(path, found)
        left = (time.perf_counter() - began) / number * (len(waiting) - number)
        say(f"evaluated {run.name}: loss {result['loss']:.4f} | {number}/{len(waiting)}, about {duration(left)} left")

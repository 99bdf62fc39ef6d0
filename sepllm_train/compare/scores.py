"""Scores of evaluations during training, where they compare: tasks that all runs were scored on in the same way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sepllm_train.base.console import quantity
from sepllm_train.compare.tables import Table, several_seeds
from sepllm_train.compare.variants import Variant, points, runs_of
from sepllm_train.runs.records import SCORE, Record, Run, score_of

# Key of a record with the conditions of each task's scores: documents, examples, data.
CONDITIONS = "evaluation"
_ERROR = "_stderr"
# The metric of a task that is drawn: the first of these that it has, else its first.
_DRAWN = ("acc", "word_perplexity", "exact_match/strict-match")


@dataclass(frozen=True)
class Score:
    """A metric of a task."""

    task: str
    metric: str

    @property
    def key(self) -> str:
        """Key of the records."""
        return f"{SCORE}{self.task}/{self.metric}"

    @property
    def name(self) -> str:
        """Task and metric in words."""
        return f"{self.task} {self.metric}"


@dataclass(frozen=True)
class CommonScores:
    """The scores that all runs have. `notes`: sentences on tasks that do not compare."""

    found: list[Score]
    notes: list[str]

    def drawn(self) -> list[Score]:
        """One score of each task."""
        tasks: dict[str, list[Score]] = {}
        for score in self.found:
            tasks.setdefault(score.task, []).append(score)
        return [min(scores, key=_rank) for scores in tasks.values()]


def _rank(score: Score) -> int:
    return _DRAWN.index(score.metric) if score.metric in _DRAWN else len(_DRAWN)


def find_scores(variants: Sequence[Variant]) -> CommonScores:
    """The metrics that every run has in its last evaluation, of tasks whose conditions were the same in all of them."""
    runs = runs_of(variants)
    if not all(run.evaluation for run in runs):
        return CommonScores([], [])
    scores = [Score(*names) for key in runs[0].evaluation[-1] if (names := score_of(key)) is not None]
    found = [one for one in scores if all(points(run, one.key)[-1:] == run.evaluation[-1:] for run in runs)]
    notes = []
    for task in dict.fromkeys(score.task for score in found):
        other = _other_conditions(runs, task)
        if other:
            found = [score for score in found if score.task != task]
            notes.append(f"Scores of {task} are left out: they have a different {other}.")
    return CommonScores(found, notes)


def _other_conditions(runs: Sequence[Run], task: str) -> str:
    """Name of the first condition of a task's scores in which two evaluations differ; empty where none does."""
    found = [conditions for run in runs for conditions in _conditions(run, task)]
    for key in dict.fromkeys(key for one in found for key in one):
        if any(one.get(key) != found[0].get(key) for one in found):
            return key
    return ""


def _conditions(run: Run, task: str) -> Iterator[Record]:
    """The conditions of a task in each evaluation of a run that has it."""
    for record in run.evaluation:
        conditions = record.get(CONDITIONS)
        if any(key.startswith(f"{SCORE}{task}/") for key in record):
            known = conditions.get(task) if isinstance(conditions, dict) else None
            yield known if isinstance(known, dict) else {}


def last_scores(variants: Sequence[Variant], scores: CommonScores) -> Table:
    """Each variant's scores in the last evaluations of its runs: the mean, and the standard error of a single run."""
    lines = []
    for variant in variants:
        last = [run.evaluation[-1] for run in variant.runs]
        line = [variant.label, quantity(fmean(record["tokens"] for record in last))]
        for score in scores.found:
            text = f"{fmean(record[score.key] for record in last):.4f}"
            error = last[0].get(f"{score.key}{_ERROR}", math.nan)
            line.append(f"{text} ± {error:.4f}" if len(last) == 1 and math.isfinite(error) else text)
        lines.append(line)
    head = "variant" if several_seeds(variants) else "run"
    return Table("Scores of the last evaluation", [head, "tokens", *(score.name for score in scores.found)], lines)


def scores_data(variants: Sequence[Variant], scores: CommonScores) -> dict[str, Any]:
    """By metric (TASK/METRIC), the last score of each run of each variant."""
    return {
        f"{score.task}/{score.metric}": {
            variant.label: [run.evaluation[-1][score.key] for run in variant.runs] for variant in variants
        }
        for score in scores.found
    }

"""Evaluation of a suite's runs on held-out text: losses of the last checkpoints, and shares of the patterns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sep_attention import keys_per_query

from sepllm_train.base.console import duration, say
from sepllm_train.base.files import write_json
from sepllm_train.config.schema import Config
from sepllm_train.data.corpus import open_corpus
from sepllm_train.data.splits import build_datasets
from sepllm_train.distributed.launch import launch_from_environment, reading_group
from sepllm_train.metrics.flops import FlopsCounter, shape_of
from sepllm_train.runs.evaluate import evaluate_run
from sepllm_train.runs.open import open_run
from sepllm_train.suite.plan import Plan, PlannedRun, finished, read_json
from sepllm_train.training.facts import mean_flops, phase_facts, sample_plan
from sepllm_train.training.schedules import schedule_of

FILE = "evaluations.json"
# Distance n beyond which a token is far recall, in every variant: the paper's window.
RECALL_WINDOW = 64
# Held-out samples behind the shares; theirs vary by a few percent from sample to sample.
SAMPLES = 32
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


@dataclass(frozen=True)
class PatternShares:
    """Pairs that a variant attends, keys that it keeps and FLOPs that it costs: means over held-out samples and layers.

    `attended`: visible pairs over those of the causal triangle. `kept`: keys that the last token of a sequence sees
    over all keys up to it, which is what a cache has to hold there (the paper's runtime KV at the last token of a
    prompt). `flops`: training FLOPs of a token by convention. Where the steps of a run differ these are means over its
    steps, and the shares are those of validation.
    """

    attended: float
    kept: float
    flops: dict[str, float]


def shares_of(config: Config) -> PatternShares:
    """Count the shares of a run's pattern. Raises UserError when its data is not there."""
    schedule = schedule_of(config)
    pattern = schedule.base
    length = config.data.sequence_length
    with reading_group(launch_from_environment()):
        corpus = open_corpus(config.data)
        training, validation = build_datasets(config, corpus)
    samples = next(iter(validation.values()), training)
    number = min(SAMPLES, len(samples)) if validation else SAMPLES  # type: ignore[arg-type]
    probed = [samples[index] for index in range(number)]
    pairs = last = 0
    for sample in probed:
        plan = sample_plan(pattern, sample)
        for layer in pattern.layers:
            keys = keys_per_query(plan, layer.window, layer.horizons)
            pairs += int(keys.sum())
            last += int(keys[0, -1])
    vocabulary = config.model.entries(corpus.vocabulary)
    counters = {
        phase.length: FlopsCounter(shape_of(config.model, vocabulary), phase.length, dense=pattern.dense)
        for phase in schedule.phases
    }
    tokens = number * length
    phases = [phase_facts(schedule, phase, counters[phase.length], probed) for phase in schedule.phases]
    return PatternShares(
        attended=counters[length].attended_share(tokens, pairs),
        kept=last / (tokens * config.model.layers),
        flops=mean_flops(phases),
    )

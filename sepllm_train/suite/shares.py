"""What a row of a suite attends and keeps, on the held-out documents."""

from __future__ import annotations

from dataclasses import dataclass

from sep_attention import keys_per_query

from sepllm_train.config.schema import Config
from sepllm_train.data.corpus import open_corpus
from sepllm_train.data.splits import build_datasets
from sepllm_train.distributed.launch import launch_from_environment, reading_group
from sepllm_train.metrics.flops import FlopsCounter, shape_of
from sepllm_train.model.build import padded_vocabulary
from sepllm_train.training.facts import mean_flops, phase_facts, sample_plan
from sepllm_train.training.schedules import schedule_of

# Held-out samples behind the shares; theirs vary by a few percent from sample to sample.
SAMPLES = 32


@dataclass(frozen=True)
class Shares:
    """Means over held-out samples and layers.

    `attended`: visible pairs over those of the causal triangle. `kept`: keys that the last token of a sequence sees
    over all keys up to it, which is what a cache has to hold there (the paper's runtime KV at the last token of a
    prompt). `flops`: training FLOPs of a token by convention. Where the steps of a run differ these are means over its
    steps, and the shares are those of validation.
    """

    attended: float
    kept: float
    flops: dict[str, float]


def shares_of(config: Config) -> Shares:
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
    padded = padded_vocabulary(config.model.vocabulary or corpus.vocabulary, config.parallel.tensor)
    counters = {
        phase.length: FlopsCounter(shape_of(config.model, padded), phase.length, dense=pattern.dense)
        for phase in schedule.phases
    }
    tokens = number * length
    phases = [phase_facts(schedule, phase, counters[phase.length], probed) for phase in schedule.phases]
    return Shares(
        attended=counters[length].attended_share(tokens, pairs),
        kept=last / (tokens * config.model.layers),
        flops=mean_flops(phases),
    )

"""Derived numbers of a run: what follows from configuration and data before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from sep_attention import AttentionPlan, attended_pairs, select_backend

from sepllm_train.base.errors import UserError
from sepllm_train.config.curriculum import Phase
from sepllm_train.config.schema import Config
from sepllm_train.config.validate import data_parallel_size
from sepllm_train.data.corpus import Corpus, Source
from sepllm_train.data.splits import SourceSplit
from sepllm_train.distributed.context import mean_keys_sent, ring_keys
from sepllm_train.metrics.flops import FlopsCounter, parameter_count, shape_of
from sepllm_train.metrics.memory import memory_estimate
from sepllm_train.model.build import PRECISIONS, padded_vocabulary
from sepllm_train.model.pattern import AttentionPattern, tiers_of_classes
from sepllm_train.training.schedules import StepSchedule, cut

# Training samples behind the figures that are printed before the first step.
PROBED_SAMPLES = 8


@dataclass(frozen=True)
class PhaseFacts:
    """A phase of a run: fraction of the causal triangle and FLOPs per token for training, means over the windows that
    its steps draw from; `most_attended` is the fraction of the window that attends the most."""

    phase: Phase
    attended_share: float
    most_attended: float
    flops_per_token: dict[str, float]


@dataclass(frozen=True)
class SourceFacts:
    """A dataset of the blend: its share `weight` of the training sequences and how often its training documents are
    read. `density`: fraction of its tokens that are separators of the classes in use; None for a pattern without."""

    source: Source
    split: SourceSplit
    weight: float
    passes: float
    density: float | None


@dataclass(frozen=True)
class ContextFacts:
    """Bytes that a context-parallel rank sends in the forward pass of a layer of this reach, for each sequence, and
    those of ring attention."""

    reach: int
    sent_bytes: float
    ring_bytes: int


@dataclass(frozen=True)
class Facts:
    """Derived numbers of a run that do not change while it trains. FLOPs are per token, for training.

    `attended_share` and `flops_per_token` are means over the samples of the run, and over the windows where steps draw
    them; `phases` has those of each phase. `counters` count the FLOPs at each sequence length. They and `parameters`
    leave out the padding of the vocabulary, which differs between layouts.
    `samples_at_once`: a micro-batch of each replica. `tokens_per_step`: of a step at training.global_batch; `samples`
    and `tokens`: of the run. `passes`: how often the run reads its training documents.
    """

    replicas: int
    vocabulary: int
    padded_vocabulary: int
    parameters: int
    samples_at_once: int
    tokens_per_step: int
    samples: int
    tokens: int
    attended_share: float
    flops_per_token: dict[str, float]
    phases: list[PhaseFacts]
    backends: dict[str, str]
    memory: dict[str, int]
    counters: dict[int, FlopsCounter]
    sources: list[SourceFacts]
    validation: tuple[Source, ...]
    passes: float
    context: list[ContextFacts]

    def micro_batches(self, phase: Phase) -> int:
        """Micro-batches of a step of a phase on each replica."""
        return phase.batch // self.samples_at_once

    def record(self) -> dict[str, Any]:
        """The figures that a tracker shows."""
        return {
            "parameters": self.parameters,
            "padded_vocabulary": self.padded_vocabulary,
            "replicas": self.replicas,
            "tokens_per_step": self.tokens_per_step,
            "flops_per_token": self.flops_per_token,
            "attended_share": self.attended_share,
            "backends": self.backends,
            "memory_bytes": self.memory,
        }


def derive(
    config: Config,
    schedule: StepSchedule,
    corpus: Corpus,
    splits: Sequence[SourceSplit],
    dataset: Any,
    world_size: int,
    device: torch.device,
) -> Facts:
    """Work out the facts of a run; attended fraction and sent keys are measured on the first samples of `dataset`.

    `splits`: of the sources of `corpus`. Raises UserError for an attention backend that cannot do the job.
    """
    model, training, length = config.model, config.training, schedule.length
    vocabulary = model.entries(corpus.vocabulary)
    padded = padded_vocabulary(vocabulary, config.parallel.tensor)
    shape, dense = shape_of(model, vocabulary), schedule.base.dense
    counters = {phase.length: FlopsCounter(shape, phase.length, dense=dense) for phase in schedule.phases}
    samples = [dataset[number] for number in range(PROBED_SAMPLES)]
    phases = [phase_facts(schedule, phase, counters[phase.length], samples) for phase in schedule.phases]
    most = phases[-1].most_attended
    replicas = data_parallel_size(config.parallel, world_size)
    read = schedule.samples(training.steps)
    return Facts(
        replicas=replicas,
        vocabulary=vocabulary,
        padded_vocabulary=padded,
        parameters=parameter_count(model, vocabulary),
        samples_at_once=training.micro_batch * replicas,
        tokens_per_step=training.global_batch * length,
        samples=read,
        tokens=read * length,
        attended_share=mean_over_samples(phases, [facts.attended_share for facts in phases]),
        flops_per_token=mean_flops(phases),
        phases=phases,
        backends=chosen_backends(config, schedule, device),
        memory=memory_estimate(config, padded, replicas=replicas, attended_share=most, device=device.type),
        counters=counters,
        sources=source_facts(config, corpus, splits, read),
        validation=corpus.validation,
        passes=_passes(splits, read),
        context=context_facts(config, schedule, [sample_plan(schedule.base, sample, length) for sample in samples]),
    )


def source_facts(config: Config, corpus: Corpus, splits: Sequence[SourceSplit], samples: int) -> list[SourceFacts]:
    """Facts of each source of the blend, of which the run reads `samples`."""
    _, tier = tiers_of_classes(config.attention)
    return [
        SourceFacts(
            source,
            split,
            weight,
            _passes([split], weight * samples),
            sum(entry.density for entry in source.header.classes if tier[entry.number]) if tier.any() else None,
        )
        for source, weight, split in zip(corpus.sources, corpus.weights(), splits, strict=True)
    ]


def _passes(splits: Sequence[SourceSplit], samples: float) -> float:
    """Passes of a run that takes so many samples from these sources over their training documents."""
    return samples / sum(split.training_samples for split in splits)


def phase_facts(
    schedule: StepSchedule, phase: Phase, counter: FlopsCounter, samples: Sequence[dict[str, torch.Tensor]]
) -> PhaseFacts:
    """Attended fraction and FLOPs of a phase, counted on `samples`; `counter` is that of its length."""
    plans = [sample_plan(schedule.base, sample, phase.length) for sample in samples]
    pairs = [sum(attended_pairs_of_layers(pattern, plan) for plan in plans) for pattern in schedule.drawn_from]
    tokens = len(samples) * schedule.length
    flops = [counter.training(tokens, number) for number in pairs]
    return PhaseFacts(
        phase,
        attended_share=counter.attended_share(tokens, sum(pairs)) / len(pairs),
        most_attended=counter.attended_share(tokens, max(pairs)),
        flops_per_token={key: fmean(one[key] for one in flops) / tokens for key in flops[0]},
    )


def mean_over_samples(phases: Sequence[PhaseFacts], values: Sequence[float]) -> float:
    """Mean over the samples of a run of a value of each phase."""
    # Counted in steps of the last phase: where all have its batch, the weights are whole numbers of steps.
    batch = phases[-1].phase.batch
    return fmean(values, weights=[facts.phase.steps * facts.phase.batch / batch for facts in phases])


def mean_flops(phases: Sequence[PhaseFacts]) -> dict[str, float]:
    """FLOPs per token, over the samples of a run; all samples have as many tokens."""
    keys = phases[0].flops_per_token
    return {key: mean_over_samples(phases, [facts.flops_per_token[key] for facts in phases]) for key in keys}


def sample_plan(pattern: AttentionPattern, sample: dict[str, torch.Tensor], length: int | None = None) -> AttentionPlan:
    """Attention plan of one sample of the data, cut into sequences of `length` tokens (None: whole)."""
    batch = cut({key: entry[None] for key, entry in sample.items()}, length or len(sample["separator_class"]))
    return pattern.plan(batch["separator_class"], batch["document_start"])


def context_facts(config: Config, schedule: StepSchedule, plans: Sequence[AttentionPlan]) -> list[ContextFacts]:
    """Facts for each reach of layers (the sequence length at most); none without context parallelism."""
    model, parallel, length = config.model, config.parallel, config.data.sequence_length
    if parallel.context == 1:
        return []
    element = PRECISIONS[config.training.precision].itemsize
    per_key = 2 * model.query_groups // parallel.tensor * model.head_dim * element
    ring = ring_keys(length, parallel.context) * per_key
    layers = [layer for pattern in schedule.drawn_from for layer in pattern.layers]
    return [
        ContextFacts(reach, mean_keys_sent(plans, reach, parallel.context) * per_key, ring)
        for reach in dict.fromkeys(min(layer.reach, length) for layer in layers)
    ]


def attended_pairs_of_layers(pattern: AttentionPattern, plan: AttentionPlan) -> int:
    """Visible (query, key) pairs of a plan, summed over its sequences and the layers of the model."""
    return sum(int(attended_pairs(plan, layer.window, layer.horizons).sum()) for layer in pattern.layers)


def chosen_backends(config: Config, schedule: StepSchedule, device: torch.device) -> dict[str, str]:
    """Attention backend -> why, over all layers and steps. Raises UserError for one that cannot do the job."""
    context = config.parallel.context
    layers = dict.fromkeys(layer for pattern in (schedule.base, *schedule.drawn_from) for layer in pattern.layers)
    try:
        choices = [
            select_backend(
                config.attention.backend,
                sequence_length=phase.length,
                queries=phase.length // (2 * context) if context > 1 else None,
                window=layer.window,
                device=device,
                separate_documents=schedule.base.separate_documents,
                sink=config.attention.sink == "learned",
                head_size=config.model.head_dim,
                dtype=PRECISIONS[config.training.precision],
            )
            for phase in schedule.phases
            for layer in layers
        ]
    except ValueError as error:
        raise UserError(f"attention.backend={config.attention.backend}: {error}.") from None
    return {choice.name: choice.reason for choice in choices}

"""Derived numbers of a run: what is printed before the first step, and the line of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from sep_attention import AttentionPlan, attended_pairs, select_backend

from sepllm_train.base.console import duration, quantity
from sepllm_train.base.errors import UserError
from sepllm_train.config.curriculum import Phase
from sepllm_train.config.schema import Config
from sepllm_train.config.validate import data_parallel_size
from sepllm_train.data.corpus import Corpus
from sepllm_train.data.splits import SourceSplit
from sepllm_train.distributed.context import mean_keys_sent, ring_keys
from sepllm_train.distributed.optional import apex_norm
from sepllm_train.metrics.flops import FlopsCounter, parameter_count, shape_of
from sepllm_train.metrics.memory import memory_estimate
from sepllm_train.model.build import PRECISIONS, padded_vocabulary
from sepllm_train.model.pattern import AttentionPattern
from sepllm_train.training.schedules import StepSchedule, cut

# Training samples behind the figures that are printed before the first step.
PROBED_SAMPLES = 8
# Passes over the sample corpus above which a run was probably meant for other data.
MANY_PASSES = 100


@dataclass(frozen=True)
class PhaseFacts:
    """A phase of a run: share of the causal triangle and FLOPs per token for training, means over the windows that its
    steps draw from; `most_attended` is the share of those that attend the most."""

    phase: Phase
    attended_share: float
    most_attended: float
    flops_per_token: dict[str, float]


@dataclass(frozen=True)
class Facts:
    """Derived numbers of a run that do not change while it trains. FLOPs are per token, for training.

    `attended_share` and `flops_per_token` are means over the steps of the run, and over the windows where steps draw
    them; `phases` tells them of each phase of a curriculum. `counters` count the FLOPs at each sequence length.
    `sent_keys`: for each reach of layers, the keys that a context-parallel rank sends forward per layer and sequence of
    data.sequence_length tokens.
    """

    replicas: int
    vocabulary: int
    padded_vocabulary: int
    parameters: int
    tokens_per_step: int
    attended_share: float
    flops_per_token: dict[str, float]
    phases: list[PhaseFacts]
    backends: dict[str, str]
    memory: dict[str, int]
    counters: dict[int, FlopsCounter]
    sent_keys: dict[int, float]


def derive(
    config: Config, schedule: StepSchedule, corpus: Corpus, dataset: Any, world_size: int, device: torch.device
) -> Facts:
    """Work out the facts of a run; attended share and sent keys are measured on the first samples of `dataset`."""
    model, length = config.model, schedule.length
    vocabulary = model.vocabulary or corpus.vocabulary
    padded = padded_vocabulary(vocabulary, config.parallel.tensor)
    shape, dense = shape_of(model, padded), schedule.base.dense
    counters = {phase.length: FlopsCounter(shape, phase.length, dense=dense) for phase in schedule.phases}
    samples = [dataset[number] for number in range(PROBED_SAMPLES)]
    phases = [phase_facts(schedule, phase, counters[phase.length], samples) for phase in schedule.phases]
    most = phases[-1].most_attended
    replicas = data_parallel_size(config.parallel, world_size)
    return Facts(
        replicas=replicas,
        vocabulary=vocabulary,
        padded_vocabulary=padded,
        parameters=parameter_count(model, padded),
        tokens_per_step=config.training.global_batch * length,
        attended_share=mean_over_steps(phases, [facts.attended_share for facts in phases]),
        flops_per_token=mean_flops(phases),
        phases=phases,
        backends=chosen_backends(config, schedule, device),
        memory=memory_estimate(config, padded, replicas=replicas, attended_share=most, device=device.type),
        counters=counters,
        sent_keys=sent_keys(config, schedule, [sample_plan(schedule.base, sample, length) for sample in samples]),
    )


def phase_facts(
    schedule: StepSchedule, phase: Phase, counter: FlopsCounter, samples: Sequence[dict[str, torch.Tensor]]
) -> PhaseFacts:
    """What a phase attends and costs, counted on `samples`; `counter` is that of its length."""
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


def mean_over_steps(phases: Sequence[PhaseFacts], values: Sequence[float]) -> float:
    """Mean over the steps of a run of a value of each phase."""
    return fmean(values, weights=[facts.phase.steps for facts in phases])


def mean_flops(phases: Sequence[PhaseFacts]) -> dict[str, float]:
    """FLOPs per token, over the steps of a run; all steps have as many tokens."""
    keys = phases[0].flops_per_token
    return {key: mean_over_steps(phases, [facts.flops_per_token[key] for facts in phases]) for key in keys}


def sample_plan(pattern: AttentionPattern, sample: dict[str, torch.Tensor], length: int | None = None) -> AttentionPlan:
    """Attention plan of one sample of the data, cut into sequences of `length` tokens (None: whole)."""
    batch = cut({key: entry[None] for key, entry in sample.items()}, length or len(sample["separator_class"]))
    return pattern.plan(batch["separator_class"], batch["document_start"])


def sent_keys(config: Config, schedule: StepSchedule, plans: Sequence[AttentionPlan]) -> dict[int, float]:
    """Reach of a layer (S at most) -> mean keys that a rank sends for it; empty without context parallelism."""
    size, length = config.parallel.context, config.data.sequence_length
    layers = [layer for pattern in schedule.drawn_from for layer in pattern.layers]
    reaches = dict.fromkeys(min(layer.reach, length) for layer in layers) if size > 1 else ()
    return {reach: mean_keys_sent(plans, reach, size) for reach in reaches}


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


def start_lines(
    config: Config,
    corpus: Corpus,
    splits: Sequence[SourceSplit],
    facts: Facts,
    world_size: int,
    device: torch.device,
) -> list[str]:
    """What is printed before the first step."""
    model, training, parallel = config.model, config.training, config.parallel
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    micro_batches = training.global_batch // (training.micro_batch * facts.replicas)
    total = facts.tokens_per_step * training.steps
    flops = facts.flops_per_token
    saving = 1 - flops["flops/model"] / flops["flops/dense"]
    mean = _mean_words(config)
    return [
        f"run: {config.run_root}/{config.name} | {_counted(world_size, 'process')} = tensor {parallel.tensor} x "
        f"pipeline {parallel.pipeline} x "
        + (f"context {parallel.context} x " if parallel.context > 1 else "")
        + f"data {facts.replicas} | {name} | {training.precision}",
        *_data_lines(config, corpus, splits),
        f"model: {model.name} | {model.layers} layers x {model.hidden} | {facts.parameters:,} parameters | vocabulary "
        f"{facts.vocabulary:,} padded to {facts.padded_vocabulary:,}",
        _attention_line(config, facts),
        *_context_lines(config, facts),
        *_compute_lines(config, cuda=device.type == "cuda"),
        f"batch: {training.global_batch} sequences x {config.data.sequence_length} = {facts.tokens_per_step:,} tokens "
        f"a step, as {micro_batches} micro-batches of {training.micro_batch} on each replica | "
        f"{training.steps:,} steps = {quantity(total)} tokens, {quantity(_passes(config, splits))} passes over the "
        "training data",
        *_phase_lines(config, facts),
        f"FLOPs per token: {quantity(flops['flops/model'])} needed, {quantity(flops['flops/dense'])} if dense causal "
        f"({saving:.1%} saved), LM head included{mean} | whole run {quantity(flops['flops/model'] * total)}FLOPs",
        "memory per process, estimated: "
        + ", ".join(f"{key} {value / 2**30:.2f} GiB" for key, value in facts.memory.items()),
        *data_warnings(config, corpus, splits),
    ]


def _counted(number: int, noun: str) -> str:
    """`1 process`, `2 processes`."""
    return f"{number} {noun}" + ("" if number == 1 else "es")


def _data_lines(config: Config, corpus: Corpus, splits: Sequence[SourceSplit]) -> list[str]:
    """One line per source."""
    lines = []
    for source, weight, split in zip(corpus.sources, corpus.weights(), splits, strict=True):
        header = source.header
        density = sum(entry.density for entry in header.classes)
        passes = f", {quantity(_passes(config, [split], weight))} passes" if len(splits) > 1 else ""
        lines.append(
            f"data: {source.prefix} | weight {weight:.3g}{passes} | {split.training_tokens:,} tokens to train on and "
            f"{split.held_out_tokens:,} held out, in {header.documents:,} documents | separators of every class "
            f"{density:.1%} | {header.tokenizer.file}"
        )
    lines += [
        f"validation: {source.prefix} | {source.header.tokens:,} tokens in {source.header.documents:,} documents"
        for source in corpus.validation
    ]
    return lines


def _passes(config: Config, splits: Sequence[SourceSplit], weight: float = 1.0) -> float:
    """How often a run that takes `weight` of its samples from these sources reads their training documents."""
    read = weight * config.training.steps * config.training.global_batch
    return read / sum(split.training_samples for split in splits)


def data_warnings(config: Config, corpus: Corpus, splits: Sequence[SourceSplit]) -> list[str]:
    """What of the data is probably not meant so."""
    fraction, passes = config.data.validation_fraction, _passes(config, splits)
    lines = [
        f"warning: {split.held_out_share:.1%} of the tokens of {source.prefix} are held out, not "
        f"data.validation_fraction={fraction}: the last documents are long, and held out whole. Prepare it from more, "
        "shorter documents to train on more of it."
        for source, split in zip(corpus.sources, splits, strict=True)
        if split.held_out_share > 2 * fraction
    ]
    if config.data.source == "sample" and passes > MANY_PASSES:
        lines.append(
            f"warning: the run passes {quantity(passes)} times over the small sample corpus: "
            "data=prefixes 'data.prefixes=[PREFIX]' trains on your own."
        )
    return lines


def _attention_line(config: Config, facts: Facts) -> str:
    """Pattern, attended share and backends."""
    attention = config.attention
    details = ""
    if attention.pattern != "dense":
        details = f" | initial {attention.initial_tokens} | window {attention.window}"
        if attention.window_choices:
            details += f", in training one of {', '.join(map(str, attention.window_choices))} a step"
        if attention.placement != "natural":
            share = "" if attention.keep_share is None else f" to {attention.keep_share:.4g}"
            details += f" | separators {attention.placement}{share}"
        details += f" | full layers {attention.full_layers}" if attention.full_layers != "none" else ""
    backends = "; ".join(f"{name} ({reason})" for name, reason in facts.backends.items())
    mean = _mean_words(config)
    return (
        f"attention: {attention.pattern}{details} | {facts.attended_share:.1%} of the causal triangle attended on the "
        f"first {PROBED_SAMPLES} samples{mean} | backend {backends}"
    )


def _mean_words(config: Config) -> str:
    """Over what the figures of a run whose steps differ are means."""
    over = ["windows"] * bool(config.attention.window_choices) + ["phases"] * bool(config.training.curriculum)
    return f", mean over the {' and '.join(over)} of training" if over else ""


def _phase_lines(config: Config, facts: Facts) -> list[str]:
    """One line per phase of a curriculum."""
    if len(facts.phases) == 1:
        return []
    lines = []
    for found in facts.phases:
        phase, flops = found.phase, found.flops_per_token["flops/model"]
        pieces = config.data.sequence_length // phase.length
        lines.append(
            f"phase: steps {phase.first:,} to {phase.last:,} | {config.training.global_batch * pieces:,} sequences x "
            f"{phase.length} a step, as micro-batches of {config.training.micro_batch * pieces} | "
            f"{found.attended_share:.1%} attended | {quantity(flops)}FLOPs per token, "
            f"{quantity(flops * phase.steps * facts.tokens_per_step)}FLOPs in all"
        )
    return lines


def _compute_lines(config: Config, *, cuda: bool) -> list[str]:
    """What is computed otherwise than by torch's own operations one by one."""
    parts = []
    if config.training.compile:
        parts.append("what is between the matrix products of a layer is compiled in the first step")
    elif norm := apex_norm(config.model.norm, cuda=cuda):
        parts.append(f"norms by apex's {norm.__name__}")
    if config.training.loss_chunk:
        parts.append(f"loss over chunks of {config.training.loss_chunk:,} tokens")
    return [f"compute: {' | '.join(parts)}"] if parts else []


def _context_lines(config: Config, facts: Facts) -> list[str]:
    """What context-parallel ranks send each other, a line for each reach of layers."""
    model, parallel, length = config.model, config.parallel, config.data.sequence_length
    element = PRECISIONS[config.training.precision].itemsize
    per_key = 2 * model.query_groups // parallel.tensor * model.head_dim * element
    ring = ring_keys(length, parallel.context) if parallel.context > 1 else 1
    lines = []
    for reach, keys in facts.sent_keys.items():
        what = f"special keys and {reach - 1:,} neighbours" if reach < length else "every earlier key (no shortcut)"
        lines.append(
            f"context: each process holds 2 of {2 * parallel.context} chunks of a sequence and is sent {what} | "
            f"{keys * per_key / 2**20:.3g} MiB per layer, sequence and process forward, as much back: "
            f"{keys / ring:.1%} of ring attention's {ring * per_key / 2**20:.3g} MiB forward"
        )
    return lines


@dataclass(frozen=True)
class StepLine:
    """Figures of one line of the console; `flops` are cumulative flops/model, `attended_share` is of this interval.
    `sequence_length` is told where it changes in the run, None elsewhere."""

    step: int
    steps: int
    sequence_length: int | None
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    mfu: float | None
    flops: float
    attended_share: float
    seconds_left: float

    def __str__(self) -> str:
        mfu = "" if self.mfu is None else f" | MFU {self.mfu:.1%}"
        length = "" if self.sequence_length is None else f" | S = {self.sequence_length}"
        return (
            f"step {self.step}/{self.steps} ({self.step / self.steps:.0%}){length} | loss {self.loss:.4f} | "
            f"grad {self.grad_norm:.3f} | lr {self.learning_rate:.2e} | {self.tokens_per_second:,.0f} tok/s{mfu} | "
            f"{quantity(self.flops)}FLOPs | attended {self.attended_share:.1%} | ETA {duration(self.seconds_left)}"
        )

"""Console lines of a run: derived numbers before the first step, a line for each logged step, progress within one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sepllm_train.base.console import duration, flop_count, fold, quantity, say
from sepllm_train.config.param_groups import group_sizes, muon_flops, muon_matrices
from sepllm_train.config.rotary import in_words
from sepllm_train.config.schema import ASSUMED_LR, Config
from sepllm_train.distributed.optional import apex_norm
from sepllm_train.training.facts import PROBED_SAMPLES, Facts, SourceFacts

# Passes over the sample corpus above which a run was probably meant for other data.
MANY_PASSES = 100
# A step shorter than this needs no progress of its own.
PATIENCE_SECONDS = 10.0
# Lines in a log file instead of a rewritten line on a terminal.
LOG_SECONDS = 60.0


def start_lines(config: Config, facts: Facts, world_size: int, device: torch.device) -> list[str]:
    """Lines that are printed before the first step, folded to the width of the console."""
    model = config.model
    lines = [
        _run_line(config, facts, world_size, device),
        *_data_lines(facts),
        f"model: {model.name} | {model.layers} layers x {model.hidden} | {facts.parameters:,} parameters | vocabulary "
        f"{facts.vocabulary:,} padded to {facts.padded_vocabulary:,}",
        recipe_line(config),
        *_position_lines(config),
        *_optimizer_lines(config, facts),
        _attention_line(config, facts),
        *_document_lines(config),
        *_context_lines(config, facts),
        *_compute_lines(config, cuda=device.type == "cuda"),
        _batch_line(config, facts),
        *_phase_lines(config, facts),
        _flops_line(config, facts),
        _memory_line(facts),
        *data_warnings(config, facts.sources, facts.passes),
    ]
    return [fold(line) for line in lines]


def _batch_line(config: Config, facts: Facts) -> str:
    """Size of the steps and of the run."""
    training, length = config.training, config.data.sequence_length
    first, last = facts.phases[0].phase, facts.phases[-1].phase
    grows = first.batch != last.batch
    shown = [first, last] if grows else [last]
    batches = " to ".join(str(phase.batch) for phase in shown)
    tokens = " to ".join(f"{phase.batch * length:,}" for phase in shown)
    micro_batches = " to ".join(str(facts.micro_batches(phase)) for phase in shown)
    return (
        f"batch: {batches} sequences x {length} = {tokens} tokens a step | {micro_batches} micro-batches of "
        f"{training.micro_batch} on each replica | {training.steps:,} steps = "
        + (f"{facts.samples:,} sequences = " if grows else "")
        + f"{quantity(facts.tokens)} tokens = {quantity(facts.passes)} passes over the training data"
        + (" | the learning rate follows the sequences read" if grows else "")
    )


def recipe_line(config: Config) -> str:
    """The model size's published settings that the run has, and its own in place of others."""
    model, recipe = config.model, config.model.recipe
    lr, min_lr = config.optim.rates
    rates = f"lr {lr:g} falling to {min_lr:g}" if config.optim.schedule != "constant" else f"lr {lr:g}"
    if recipe.rate is None:
        assumed = f", assumed: no recipe is published for {model.name}" if lr == ASSUMED_LR else ""
        return f"optimizer: {rates}{assumed} | schedule {config.optim.schedule}"
    own = "" if lr == recipe.rate else f" (yours; published {recipe.rate:g})"
    hint = f" | published run: micro-batches of {recipe.micro_batch} on {recipe.gpus} GPUs" if recipe.gpus else ""
    hint += f", tensor {recipe.tensor}" if hint and (recipe.tensor or 1) > 1 else ""
    return f"recipe: {model.name} | {rates}{own} | schedule {config.optim.schedule} | {model.activation}{hint}"


def _optimizer_lines(config: Config, facts: Facts) -> list[str]:
    """Muon's part of the model, and one line per entry of optim.groups."""
    lines, matrices = [], muon_matrices(config)
    if matrices:
        elements = config.model.layers * sum(rows * columns for rows, columns in matrices.values())
        flops = config.model.layers * sum(map(muon_flops, matrices.values()))
        share = flops / (facts.flops_per_token["flops/model"] * facts.tokens_per_step)
        lines.append(
            f"muon: {elements:,} parameters, the layers' {', '.join(matrices)}; Adam the rest | update scaled by 0.2 "
            f"sqrt(max(rows, columns)) to the size of Adam's | {flop_count(flops)} a step besides the model's, "
            f"{share:.1%} of them"
        )
    lr, _ = config.optim.rates
    for group, size in group_sizes(config):
        own = [f"lr x {group['lr_factor']:g} = {lr * group['lr_factor']:g}"] if "lr_factor" in group else []
        own += [f"{key.replace('_', ' ')} {group[key]}" for key in ("weight_decay", "optimizer") if key in group]
        lines.append(f"group {group['match']}: {size:,} parameter tensors | {' | '.join(own)}")
    return lines


def _run_line(config: Config, facts: Facts, world_size: int, device: torch.device) -> str:
    """Folder, process grid, device and precision."""
    parallel = config.parallel
    threads = torch.get_num_threads()
    cpu = f"CPU, {threads} {'thread' if threads == 1 else 'threads'}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    context = f"context {parallel.context} x " if parallel.context > 1 else ""
    return (
        f"run: {config.run_root}/{config.name} | {processes(world_size)} = tensor {parallel.tensor} x pipeline "
        f"{parallel.pipeline} x {context}data {facts.replicas} | {name} | {config.training.precision}"
    )


def processes(number: int) -> str:
    """`1 process`, `2 processes`."""
    return "1 process" if number == 1 else f"{number} processes"


def _data_lines(facts: Facts) -> list[str]:
    """One line per dataset."""
    lines = []
    for found in facts.sources:
        header, split = found.source.header, found.split
        passes = f", {quantity(found.passes)} passes" if len(facts.sources) > 1 else ""
        density = "" if found.density is None else f" | separators in use {found.density:.1%} of the tokens"
        lines.append(
            f"data: {found.source.prefix} | weight {found.weight:.3g}{passes} | {split.training_tokens:,} tokens to "
            f"train on, {split.held_out_tokens:,} held out | {header.documents:,} documents{density} | tokenizer "
            f"{header.tokenizer.file}"
        )
    lines += [
        f"validation: {source.prefix} | {source.header.tokens:,} tokens in {source.header.documents:,} documents"
        for source in facts.validation
    ]
    return lines


def data_warnings(config: Config, sources: Sequence[SourceFacts], passes: float) -> list[str]:
    """Warnings about data that was probably not meant so."""
    fraction = config.data.validation_fraction
    lines = [
        f"warning: {found.split.held_out_share:.1%} of the tokens of {found.source.prefix} are held out, not "
        f"data.validation_fraction={fraction}: the last documents are long, and held out whole. Prepare it from more, "
        "shorter documents to train on more of it."
        for found in sources
        if found.split.held_out_share > 2 * fraction
    ]
    if config.data.source == "sample" and passes > MANY_PASSES:
        lines.append(
            f"warning: the run passes {quantity(passes)} times over the small sample corpus: "
            "data=prefixes 'data.prefixes=[PREFIX]' trains on your own."
        )
    return lines


def _position_lines(config: Config) -> list[str]:
    """Scaling of rotary positions, if there is one, beside the length that it is made for."""
    scaling, length = config.model.rotary_scaling, config.data.sequence_length
    if scaling.rope_type is None:
        return []
    line = f"positions: rotary base {config.model.rotary_theta:,.10g} | scaling {in_words(scaling.record())}"
    if scaling.attention_scaling != 1:
        line += f" | cosines and sines x {scaling.attention_scaling:.4f}"
    if original := scaling.original_max_position_embeddings:
        reach = original * (scaling.factor or 1)
        line += f" | made for {reach:,.0f} tokens, sequences have {length:,}"
        line += ", more than that: raise model.rotary_scaling.factor" if length > reach else ""
    return [line]


def _attention_line(config: Config, facts: Facts) -> str:
    """Pattern, attended fraction and backends."""
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
    return (
        f"attention: {attention.pattern}{details} | {facts.attended_share:.1%} of the causal triangle attended on the "
        f"first {PROBED_SAMPLES} samples{_mean_words(config)} | backend {backends}"
    )


def _document_lines(config: Config) -> list[str]:
    """One line on documents where positions restart at them or labels are masked; none elsewhere."""
    restart, masked = config.attention.restart_positions, config.data.mask_boundary_loss
    if not restart and not masked:
        return []
    parts = [
        "attention within a document" if config.attention.separate_documents else "attention across documents",
        "positions restart at each" if restart else "positions of the sequence",
        f"the first token of the next document {'does not count' if masked else 'counts'} as a label",
    ]
    return [f"documents: {' | '.join(parts)}"]


def _mean_words(config: Config) -> str:
    """Clause on the averaging of figures in a run whose steps differ."""
    over = ["windows"] * bool(config.attention.window_choices) + ["phases"] * bool(config.training.curriculum)
    return f", mean over the {' and '.join(over)} of training" if over else ""


def _phase_lines(config: Config, facts: Facts) -> list[str]:
    """One line per phase of a curriculum or a batch schedule."""
    if len(facts.phases) == 1:
        return []
    lines, several = [], len({found.phase.batch for found in facts.phases}) > 1
    for found in facts.phases:
        phase, flops = found.phase, found.flops_per_token["flops/model"]
        pieces = config.data.sequence_length // phase.length
        tokens = phase.steps * phase.batch * config.data.sequence_length
        lines.append(
            f"phase: steps {phase.first:,} to {phase.last:,} | {phase.batch * pieces:,} sequences x {phase.length} a "
            f"step, as {f'{facts.micro_batches(phase)} ' if several else ''}micro-batches of "
            f"{config.training.micro_batch * pieces} | {found.attended_share:.1%} attended | "
            f"{flop_count(flops)} per token, {flop_count(flops * tokens)} in all"
        )
    return lines


def _flops_line(config: Config, facts: Facts) -> str:
    """Work per token and of the whole run."""
    flops = facts.flops_per_token
    saving = 1 - flops["flops/model"] / flops["flops/dense"]
    return (
        f"FLOPs per token: {quantity(flops['flops/model'])} needed, {quantity(flops['flops/dense'])} if dense causal "
        f"({saving:.1%} saved), LM head included{_mean_words(config)} | whole run "
        f"{flop_count(flops['flops/model'] * facts.tokens)}"
    )


def _memory_line(facts: Facts) -> str:
    """Estimated peak of the busiest process, with its parts."""
    gib = {key: f"{value / 2**30:.2f}" for key, value in facts.memory.items()}
    parts = " + ".join(f"{key} {size}" for key, size in gib.items() if key != "total")
    return f"memory per process, estimated: {gib['total']} GiB = {parts}"


def _compute_lines(config: Config, *, cuda: bool) -> list[str]:
    """Replacements of torch's own operations, if there are any."""
    parts = []
    if config.training.compile:
        parts.append("operations between the matrix products of a layer are compiled in the first step")
    elif norm := apex_norm(config.model.norm, cuda=cuda):
        parts.append(f"norms by apex's {norm.__name__}")
    if config.training.loss_chunk:
        parts.append(f"loss over chunks of {config.training.loss_chunk:,} tokens")
    return [f"compute: {' | '.join(parts)}"] if parts else []


def _context_lines(config: Config, facts: Facts) -> list[str]:
    """Traffic of context parallelism, a line for each reach of layers."""
    length, chunks = config.data.sequence_length, 2 * config.parallel.context
    lines = []
    for found in facts.context:
        local = found.reach < length
        what = f"separators and {found.reach - 1:,} local keys" if local else "every earlier key (no shortcut)"
        lines.append(
            f"context: each process holds 2 of {chunks} chunks of a sequence and receives {what} | "
            f"{found.sent_bytes / 2**20:.3g} MiB per layer, sequence and process forward, as much backward | "
            f"{found.sent_bytes / found.ring_bytes:.1%} of ring attention's {found.ring_bytes / 2**20:.3g} MiB"
        )
    return lines


@dataclass(frozen=True)
class StepLine:
    """Figures of one line of the console; `flops` are cumulative flops/model, `attended_share` is of this interval.
    `sequence_length` and `batch` are shown where they change during the run, None elsewhere; `skipped` and `bad` count
    the steps of the interval that fp16 or the judgement left out."""

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
    skipped: int = 0
    bad: int = 0
    batch: int | None = None

    def __str__(self) -> str:
        parts = [
            f"step {self.step}/{self.steps} ({self.step / self.steps:.0%})",
            *([] if self.sequence_length is None else [f"S {self.sequence_length}"]),
            *([] if self.batch is None else [f"batch {self.batch}"]),
            f"loss {self.loss:.4f}",
            f"grad {self.grad_norm:.3f}",
            f"lr {self.learning_rate:.1e}",
            f"{quantity(self.tokens_per_second)} tok/s",
            *([] if self.mfu is None else [f"MFU {self.mfu:.0%}"]),
            flop_count(self.flops),
            f"attended {self.attended_share:.1%}",
            f"ETA {duration(self.seconds_left)}",
            *([f"{self.skipped} steps skipped (overflow)"] if self.skipped else []),
            *([f"{self.bad} bad steps skipped"] if self.bad else []),
        ]
        # Two spaces, not a bar: the line of a long run on a GPU is 120 characters long.
        return fold("  ".join(parts))


class StepProgress:
    """Prints how far a step is once it has taken ten seconds, on rank 0."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.terminal = sys.stdout.isatty()
        self.active = os.environ.get("RANK", "0") == "0"
        self.step = self.micro_batches = 0
        self.began = self.reported = time.perf_counter()
        self.shown = False

    def begin(self, step: int, micro_batches: int) -> None:
        """Start a step of so many micro-batches."""
        self.step, self.micro_batches, self.shown = step, micro_batches, False
        self.began = self.reported = time.perf_counter()

    def micro_batch(self, number: int) -> None:
        """Note that the forward pass of micro-batch `number` (from 1) starts."""
        now = time.perf_counter()
        wait = PATIENCE_SECONDS if self.terminal or not self.shown else LOG_SECONDS
        if not self.active or number < 2 or now - self.reported < wait:
            return
        self.reported, self.shown = now, True
        left = (now - self.began) / (number - 1) * (self.micro_batches - number + 1)
        text = (
            f"step {self.step}/{self.steps}: micro-batch {number}/{self.micro_batches}, step done in {duration(left)}"
        )
        if self.terminal:
            print(f"\r\033[K{text}", end="", flush=True)
        else:
            say(text)

    def end(self) -> None:
        """Clear the rewritten line at the end of the step."""
        if self.terminal and self.shown:
            print("\r\033[K", end="", flush=True)

"""Records and console lines of the steps: sums over an interval, reduced over ranks, for metrics.jsonl and the user."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sepllm_train.base.console import duration, fold, say
from sepllm_train.metrics.flops import FlopsCounter, peak_tflops
from sepllm_train.metrics.log import MetricsLog
from sepllm_train.training.checkpoint import Outcome
from sepllm_train.training.clock import step_parts
from sepllm_train.training.console_lines import StepLine
from sepllm_train.training.live_run import LiveRun
from sepllm_train.training.step import StepResult, reduce_over_ranks
from sepllm_train.training.update import documents_of


@dataclass
class LogInterval:
    """Steps between two log lines. `sums` f64 [3 + layers], on the device: losses, micro-batches counted, visible
    pairs, and pairs of each layer; `windows` is the sum of the windows that were drawn."""

    sums: Tensor
    steps: int = 0
    seconds: float = 0.0
    windows: int = 0
    context_bytes: int = 0
    skipped: int = 0
    bad: int = 0
    lost_workers: int = 0


class StepLogger:
    """Adds up the steps of a run and logs them. Every rank calls it; rank 0 writes (`metrics` is None elsewhere).

    `interval` is what the next log line is about, `last` the result of the last step.
    """

    def __init__(self, run: LiveRun, metrics: MetricsLog | None, bad_steps: MetricsLog | None) -> None:
        self.run = run
        self.metrics = metrics
        self.bad_steps = bad_steps
        self.first_step = run.state.step
        self.began = time.perf_counter()
        self.last: StepResult
        self.interval = self._new_interval()
        # Figures of the last checkpoint that no record has yet, and failures so far.
        self.checkpoint_record: dict[str, float] = {}
        self.failed_checkpoints = 0

    def add(self, result: StepResult, window: int) -> None:
        """Add a step to the interval; the sums stay on the device. A bad step adds no loss."""
        interval, nothing = self.interval, torch.zeros_like(result.loss)
        loss, counted = (result.loss, result.counted) if result.bad is None else (nothing, nothing)
        interval.sums += torch.cat((torch.stack((loss, counted, result.pairs.double())), result.layer_pairs.double()))
        interval.steps += 1
        interval.windows += window
        interval.context_bytes += result.context_bytes
        interval.skipped += result.skipped
        interval.bad += result.bad is not None
        interval.lost_workers += round(result.sums[1])
        self.last = result

    def log(self) -> None:
        """Reduce the interval over ranks, move it into the counters of the run, write a record and a line."""
        run, interval = self.run, self.interval
        if not interval.steps:
            return
        begin = time.perf_counter()
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        interval.seconds += time.perf_counter() - begin
        loss, count, pairs, *layer_pairs, sent = reduce_over_ranks(interval.sums, interval.context_bytes)
        phase = run.schedule.phase(run.state.step)
        tokens = interval.steps * phase.batch * run.schedule.length
        self._count(tokens, round(pairs))
        counter = run.facts.counters[phase.length]
        batches = {one.batch for one in run.schedule.phases}
        mfu = self._mfu(counter.training(tokens, round(pairs))["flops/model"] / interval.seconds)
        record = {
            "train/loss": loss / count if count else math.nan,
            "train/grad_norm": self.last.grad_norm,
            "train/lr": self.last.learning_rate,
            "train/tokens_per_second": tokens / interval.seconds,
            "train/step_seconds": interval.seconds / interval.steps,
            "train/attended_share": counter.attended_share(tokens, round(pairs)),
            **self._layer_fractions(counter, tokens, layer_pairs),
            **({"train/sequence_length": phase.length} if len(run.facts.counters) > 1 else {}),
            **({"train/global_batch": phase.batch} if len(batches) > 1 else {}),
            **({"train/window": interval.windows / interval.steps} if run.schedule.patterns else {}),
            **self._counted_share(count),
            "train/skipped_steps": interval.skipped,
            "train/bad_steps": interval.bad,
            "train/lost_workers": interval.lost_workers,
            "train/memory_bytes": _memory(run.device),
            **step_parts(run.stepper.clock.take(), interval.steps, run.device),
            **({} if run.config.parallel.context == 1 else {"train/context_bytes": sent / interval.steps}),
            **({} if mfu is None else {"train/mfu": mfu}),
            **self.checkpoint_record,
        }
        self.checkpoint_record = {}
        self.write(record)
        say(str(self._line(record, mfu)))
        self.interval = self._new_interval()

    def bad_step(self, reason: str, dataset: Any) -> None:
        """Record that the last step, of samples of `dataset`, was left out for `reason`."""
        run = self.run
        samples = range(run.schedule.samples(run.state.step - 1), run.schedule.samples(run.state.step))
        if self.bad_steps is not None:
            self.bad_steps.write(
                {
                    "step": run.state.step,
                    "reason": reason,
                    "loss": self.last.mean_loss,
                    "grad_norm": self.last.grad_norm,
                    "documents": documents_of(dataset, samples),
                }
            )
        if run.state.bad_in_a_row == 1:
            say(
                fold(
                    f"warning: step {run.state.step} is skipped: {reason}. Weights and optimizer are as before it; its "
                    f"documents are in {run.folder / 'bad_steps.jsonl'}."
                )
            )

    def checkpoints(self, outcomes: Sequence[Outcome]) -> None:
        """Report checkpoints that were written or could not be; the next record has the figures of the last one."""
        for outcome in outcomes:
            if outcome.error is None:
                say(f"checkpoint {outcome.checkpoint} in {duration(outcome.seconds)}")
            else:
                self.failed_checkpoints += 1
                say(
                    fold(
                        f"warning: checkpoint {outcome.checkpoint} could not be written ({outcome.error}) | training "
                        "continues, earlier checkpoints are kept, and another is written when the next is due"
                    )
                )
            self.checkpoint_record = {
                "checkpoint/seconds": outcome.seconds,
                "checkpoint/stall_seconds": outcome.stall_seconds,
                "checkpoint/bytes": outcome.bytes,
                "checkpoint/failures": self.failed_checkpoints,
            }

    def end(self) -> None:
        """Write the figures of the last checkpoint."""
        if self.checkpoint_record:
            self.write(self.checkpoint_record)
            self.checkpoint_record = {}

    def write(self, record: dict[str, Any]) -> None:
        """Add the counters every line has, and append to metrics.jsonl."""
        if self.metrics is not None:
            state = self.run.state
            head = {"step": state.step, "tokens": state.tokens, "seconds": state.seconds}
            self.metrics.write({**head, **self._totals(), **record})

    def has(self, key: str) -> bool:
        """True when metrics.jsonl has a record of this step with `key`. Every rank calls it, for what rank 0 sees."""
        seen = self.metrics is not None and self.metrics.has(self.run.state.step, key)
        everywhere = torch.tensor(float(seen), device=self.run.device)
        dist.all_reduce(everywhere)
        return bool(everywhere > 0)

    def _new_interval(self) -> LogInterval:
        return LogInterval(torch.zeros(3 + self.run.config.model.layers, dtype=torch.float64, device=self.run.device))

    def _count(self, tokens: int, pairs: int) -> None:
        """Move the interval into the counters of the run."""
        state = self.run.state
        state.tokens += tokens
        state.pairs += pairs
        state.seconds += self.interval.seconds
        if state.step == self.run.schedule.phase(state.step).last < self.run.config.training.steps:
            state.finished_pairs.append(state.pairs - sum(state.finished_pairs))

    def _totals(self) -> dict[str, int]:
        """FLOPs so far in the three conventions, summed over the phases."""
        state, facts = self.run.state, self.run.facts
        finished, left = state.finished_pairs, state.tokens
        totals = Counter[str]()
        for phase, pairs in zip(self.run.schedule.phases, [*finished, state.pairs - sum(finished)], strict=False):
            tokens = min(left, phase.steps * phase.batch * self.run.schedule.length)
            totals.update(facts.counters[phase.length].training(tokens, pairs))
            left -= tokens
        return dict(totals)

    def _line(self, record: dict[str, Any], mfu: float | None) -> StepLine:
        """Console line of the interval."""
        step, steps = self.run.state.step, self.run.config.training.steps
        # Time goes with samples, of which steps may have different numbers.
        first, done = (self.run.schedule.samples(number) for number in (self.first_step, step))
        return StepLine(
            step,
            steps,
            record.get("train/sequence_length"),
            record["train/loss"],
            self.last.grad_norm,
            self.last.learning_rate,
            record["train/tokens_per_second"],
            mfu,
            self._totals()["flops/model"],
            record["train/attended_share"],
            (time.perf_counter() - self.began) / (done - first) * (self.run.facts.samples - done),
            skipped=self.interval.skipped,
            bad=self.interval.bad,
            batch=record.get("train/global_batch"),
        )

    def _layer_fractions(self, counter: FlopsCounter, tokens: int, layer_pairs: list[float]) -> dict[str, float]:
        """Attended fraction of each layer, counted from 0; nothing when all attend alike."""
        layers = self.run.schedule.drawn_from[0].layers
        if len(set(layers)) == 1:
            return {}
        return {
            f"train/layer_{number:02d}/attended_share": counter.attended_share(tokens, round(pairs) * len(layers))
            for number, pairs in enumerate(layer_pairs)
        }

    def _counted_share(self, counted: float) -> dict[str, float]:
        """Share of the labels that counted in the steps that were not bad, from their `counted` micro-batches; nothing
        where all count."""
        run, steps = self.run, self.interval.steps - self.interval.bad
        if not run.config.data.mask_boundary_loss or not steps:
            return {}
        batch = run.facts.micro_batches(run.schedule.phase(run.state.step)) * run.facts.replicas
        return {"train/counted_share": counted / (steps * batch)}

    def _mfu(self, flops_per_second: float) -> float | None:
        """flops/model per second over the peak of all devices; None where the peak is not known."""
        config, device = self.run.config, self.run.device
        peak = config.logging.peak_tflops
        if peak is None and device.type == "cuda":
            peak = peak_tflops(torch.cuda.get_device_name(device))
        devices = config.parallel.processes * self.run.facts.replicas
        return None if peak is None else flops_per_second / (peak * 1e12 * devices)


def _memory(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

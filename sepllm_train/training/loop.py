"""The training loop: steps, validation, checkpoints, metrics."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils.data import Dataset

from sepllm_train.base.console import duration, say
from sepllm_train.config.schema import Config
from sepllm_train.data.loader import Batch, MaskedDataset, MicroBatchSampler, PaddedSampler, micro_batches
from sepllm_train.metrics.flops import FlopsCounter
from sepllm_train.metrics.log import MetricsLog
from sepllm_train.metrics.peak import peak_tflops
from sepllm_train.training import checkpoint
from sepllm_train.training.anomalies import BadStepDetector, documents_of
from sepllm_train.training.clock import step_parts
from sepllm_train.training.guards import Guards
from sepllm_train.training.profile import StepProfiler
from sepllm_train.training.progress import StepProgress
from sepllm_train.training.report import Facts, StepLine
from sepllm_train.training.schedules import StepSchedule
from sepllm_train.training.setup import Training
from sepllm_train.training.state import TrainState
from sepllm_train.training.step import Stepper, StepResult, reduce_over_ranks


class Loop:
    """Trains from `state` to the last step. Every rank runs it; rank 0 writes (`metrics` is None elsewhere)."""

    def __init__(
        self,
        config: Config,
        facts: Facts,
        training: Training,
        stepper: Stepper,
        schedule: StepSchedule,
        state: TrainState,
        *,
        guards: Guards,
        metrics: MetricsLog | None,
        bad_steps: MetricsLog | None,
        run_folder: Any,
        identities: dict[str, Any],
        token_bytes: list[int],
        device: torch.device,
    ) -> None:
        self.config = config
        self.facts = facts
        self.training = training
        self.stepper = stepper
        self.schedule = schedule
        self.state = state
        self.guards = guards
        self.detector = BadStepDetector(config.training, state)
        # Whether the ranks have agreed to stop early, after the step that is done.
        self.stopping = False
        self.metrics = metrics
        self.bad_steps = bad_steps
        self.run_folder = run_folder
        self.saver = checkpoint.Saver(
            run_folder,
            training,
            identities,
            keep=config.training.keep_checkpoints,
            keep_every=config.training.keep_every,
            background=config.training.async_checkpoint,
        )
        # Figures of the last checkpoint that no record has yet, and failures so far.
        self.checkpoint_record: dict[str, float] = {}
        self.failed_checkpoints = 0
        self.device = device
        self.profiler = StepProfiler(config.logging, run_folder / "profile", dist.get_rank(), device)
        self.token_bytes = torch.tensor(token_bytes, device=device)
        self.replica = parallel_state.get_data_parallel_rank()
        self.micro_batches = config.training.global_batch // (config.training.micro_batch * facts.replicas)
        self.first_step = state.step
        self.began = time.perf_counter()
        self.last: StepResult
        # Of the last validation, mean of the datasets, nats per token.
        self.validation_loss: float | None = None
        self._new_interval()

    def run(self, dataset: Dataset, validation: dict[str, Dataset]) -> None:
        """Train to training.steps, validating and saving on the way and at the end.

        When any rank is asked to stop, the step is finished and saved, and that is the end: `stopping` is true.
        Raises UserError when a file of the data changes; nothing that was trained since the last look is saved then.
        Raises BadSteps after training.max_bad_steps bad steps in a row, and in place of the last save when every step
        was bad or the last validation loss is not finite.
        """
        training = self.config.training
        iterators = [self._training_batches(dataset) for _ in self.training.chunks]
        self._agree_to_stop()
        if _due(self.state.step, training.validation_interval) and not self.stopping and not self._validated():
            self._validate(validation)
        progress = StepProgress(self.micro_batches, training.steps)
        while self.state.step < training.steps and not self.stopping:
            self.profiler.before(self.state.step + 1)
            self._step(iterators, progress)
            if compiled := self.guards.compilation.take():
                say(compiled)
            self._profiled()
            if self.last.bad is not None:
                self._skipped(self.last.bad, dataset)
            step, end = self.state.step, self.stopping or self.state.step == training.steps
            # An interval lies in one phase: its pairs are counted against one length.
            phase_ends = step == self.schedule.phase(step).last
            log = end or phase_ends or step % self.config.logging.interval == 0
            # Who stops a run may not leave it the time to validate: that is made up for when it continues.
            validate = step == training.steps or (_due(step, training.validation_interval) and not self.stopping)
            save = end or _due(step, training.checkpoint_interval)
            if log or validate or save:
                self.guards.check_data()
            if log:
                self._log()
            if validate:
                self._validate(validation)
            if step == training.steps:
                failure = self.detector.failure_of_run(self.last.bad, self.validation_loss)
                if failure is not None:
                    raise failure
            if save:
                self._save()
            self._report_checkpoints(self.saver.poll())
        self._finish_checkpoint()

    def _training_batches(self, dataset: Dataset) -> Iterator[Batch]:
        """Micro-batches of this replica from the next step on."""
        training = self.config.training
        sampler = MicroBatchSampler(
            range(self.state.step, training.steps),
            global_batch=training.global_batch,
            micro_batch=training.micro_batch,
            replica=self.replica,
            replicas=self.facts.replicas,
        )
        return micro_batches(
            dataset,
            sampler,
            workers=self.config.data.workers,
            device=self.device,
            on_host=self.stepper.on_host,
            vocabulary=self.facts.vocabulary,
            lost=self.guards.worker_lost,
        )

    def _agree_to_stop(self) -> None:
        """Find out whether any rank was asked to stop before there was a step to finish."""
        asked = torch.tensor(self.guards.numbers(), dtype=torch.float64, device=self.device)
        dist.all_reduce(asked)
        self.stopping = bool(asked[0] > 0)

    def _step(self, iterators: list[Iterator[Batch]], progress: StepProgress) -> None:
        """One optimizer step; sums stay on the device until the interval is logged. A bad step has no loss in them."""
        number = self.state.step + 1

        def micro_batch(part: int) -> None:
            self.guards.watchdog.beat(f"step {number}, micro-batch {part}")
            progress.micro_batch(part)

        def own_numbers() -> list[float]:
            self.guards.watchdog.beat(f"the update of step {number}")
            return self.guards.numbers()

        begin = time.perf_counter()
        self.stepper.use(self.schedule.pattern(number), self.schedule.phase(number).length)
        self.windows += self.schedule.window(number) or 0
        self.stepper.clock.begin()
        progress.begin(number)
        result = self.stepper.train(
            iterators, self.micro_batches, micro_batch, judge=self.detector.judge, own=own_numbers
        )
        progress.end()
        nothing = torch.zeros_like(result.loss)
        loss, counted = (result.loss, self._counted) if result.bad is None else (nothing, nothing)
        self.sums += torch.cat((torch.stack((loss, counted, result.pairs.double())), result.layer_pairs.double()))
        self.context_bytes += result.context_bytes
        asked_to_stop, lost_workers = result.sums
        self.stopping = asked_to_stop > 0
        self.lost_workers += round(lost_workers)
        self.last = result
        self.skipped += result.skipped
        self.state.overflows += result.skipped
        self.bad += result.bad is not None
        self.interval_steps += 1
        # Nothing waits for the device here: the next step is prepared while it updates the weights.
        self.stepper.clock.end()
        self.interval_seconds += time.perf_counter() - begin
        self.state.step += 1

    def _skipped(self, reason: str, dataset: Any) -> None:
        """Tell of the step that was just left out, and stop when there were too many in a row."""
        step, batch = self.state.step, self.config.training.global_batch
        if self.bad_steps is not None:
            documents = documents_of(dataset, range((step - 1) * batch, step * batch))
            self.bad_steps.write(
                {
                    "step": step,
                    "reason": reason,
                    "loss": self.last.mean_loss,
                    "grad_norm": self.last.grad_norm,
                    "documents": documents,
                }
            )
        if self.state.bad_in_a_row == 1:
            say(
                f"warning: step {step} is skipped: {reason}. Weights and optimizer are as before it; its documents are "
                f"in {self.run_folder / 'bad_steps.jsonl'}."
            )
        if self.detector.exhausted:
            self._log()
            raise self.detector.failure(step, reason)

    def _profiled(self) -> None:
        """Write the trace of logging.profile when its last step is done."""
        self.guards.watchdog.beat(f"the profile up to step {self.state.step}")
        try:
            trace = self.profiler.after(self.state.step)
        except OSError as error:
            say(f"warning: the profile could not be written ({error.strerror}): training goes on")
            return
        if trace is not None:
            say(f"profile: {trace}, for chrome://tracing or ui.perfetto.dev; operators by time in the .txt beside it")

    def _new_interval(self) -> None:
        """Start the sums between two log lines: losses, micro-batches behind them, pairs, and pairs of each layer (f64
        [3 + layers])."""
        self.sums = torch.zeros(3 + self.config.model.layers, dtype=torch.float64, device=self.device)
        holds_loss = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self._counted = torch.tensor(float(self.micro_batches * holds_loss), dtype=torch.float64, device=self.device)
        self.context_bytes = 0
        self.windows = 0
        self.interval_steps = 0
        self.interval_seconds = 0.0
        self.skipped = 0
        self.bad = 0
        self.lost_workers = 0

    def _log(self) -> None:
        """Reduce the interval over ranks, move it into the counters, write a line."""
        if not self.interval_steps:
            return
        begin = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.interval_seconds += time.perf_counter() - begin
        loss, count, pairs, *layer_pairs, sent = reduce_over_ranks(self.sums, self.context_bytes)
        tokens = self.interval_steps * self.facts.tokens_per_step
        seconds = self.interval_seconds
        self.state.tokens += tokens
        self.state.pairs += round(pairs)
        self.state.seconds += seconds
        phase = self.schedule.phase(self.state.step)
        if self.state.step == phase.last < self.config.training.steps:
            self.state.finished_pairs.append(self.state.pairs - sum(self.state.finished_pairs))
        counter = self.facts.counters[phase.length]
        share = counter.attended_share(tokens, round(pairs))
        flops = counter.training(tokens, round(pairs))["flops/model"]
        mfu = self._mfu(flops / seconds)
        several = len(self.schedule.phases) > 1
        record = {
            "train/loss": loss / count if count else math.nan,
            "train/grad_norm": self.last.grad_norm,
            "train/lr": self.last.learning_rate,
            "train/tokens_per_second": tokens / seconds,
            "train/step_seconds": seconds / self.interval_steps,
            "train/attended_share": share,
            **self._layer_shares(counter, tokens, layer_pairs),
            **({"train/sequence_length": phase.length} if several else {}),
            **({"train/window": self.windows / self.interval_steps} if self.schedule.patterns else {}),
            "train/skipped_steps": self.skipped,
            "train/bad_steps": self.bad,
            "train/lost_workers": self.lost_workers,
            "train/memory_bytes": _memory(self.device),
            **step_parts(self.stepper.clock.take(), self.interval_steps, self.device),
            **({} if self.config.parallel.context == 1 else {"train/context_bytes": sent / self.interval_steps}),
            **({} if mfu is None else {"train/mfu": mfu}),
            **self.checkpoint_record,
        }
        self.checkpoint_record = {}
        self._write(record)
        elapsed = time.perf_counter() - self.began
        left = elapsed / (self.state.step - self.first_step) * (self.config.training.steps - self.state.step)
        line = StepLine(
            self.state.step,
            self.config.training.steps,
            phase.length if several else None,
            record["train/loss"],
            self.last.grad_norm,
            self.last.learning_rate,
            record["train/tokens_per_second"],
            mfu,
            self._totals()["flops/model"],
            share,
            left,
        )
        overflows = f" | {self.skipped} steps skipped (overflow)" if self.skipped else ""
        bad = f" | {self.bad} bad steps skipped" if self.bad else ""
        say(f"{line}{overflows}{bad}")
        self._new_interval()

    def _layer_shares(self, counter: FlopsCounter, tokens: int, layer_pairs: list[float]) -> dict[str, float]:
        """Attended share of each layer, counted from 0; nothing when all attend alike."""
        layers = self.schedule.drawn_from[0].layers
        if len(set(layers)) == 1:
            return {}
        return {
            f"train/layer_{number:02d}/attended_share": counter.attended_share(tokens, round(pairs) * len(layers))
            for number, pairs in enumerate(layer_pairs)
        }

    def _mfu(self, flops_per_second: float) -> float | None:
        """flops/model per second over the peak of all devices; None where the peak is not known."""
        peak = self.config.logging.peak_tflops
        if peak is None and self.device.type == "cuda":
            peak = peak_tflops(torch.cuda.get_device_name(self.device))
        devices = self.config.parallel.processes * self.facts.replicas
        return None if peak is None else flops_per_second / (peak * 1e12 * devices)

    def _validate(self, datasets: dict[str, Dataset]) -> None:
        """Loss of each held-out dataset, and their mean over tokens of equal count."""
        if not datasets or self.config.training.validation_samples == 0:
            return
        self._log()
        self.stepper.use(self.schedule.base, self.schedule.length)
        begin = time.perf_counter()
        record: dict[str, float] = {}
        for name, dataset in datasets.items():
            nats, per_byte = self._validate_one(dataset)
            record |= {f"val/{name}/loss": nats, f"val/{name}/bits_per_byte": per_byte}
        for key in ("loss", "bits_per_byte"):
            record[f"val/{key}"] = sum(record[f"val/{name}/{key}"] for name in datasets) / len(datasets)
        self.validation_loss = record["val/loss"]
        record["val/seconds"] = time.perf_counter() - begin
        self._write(record)
        say(
            f"validation at step {self.state.step}: loss {record['val/loss']:.4f}, "
            f"{record['val/bits_per_byte']:.4f} bits per byte, {duration(record['val/seconds'])}"
        )

    def _validated(self) -> bool:
        """Whether metrics.jsonl has the validation at this step. Every rank calls it and learns what rank 0 sees."""
        seen = self.metrics is not None and self.metrics.has(self.state.step, "val/loss")
        everywhere = torch.tensor(float(seen), device=self.device)
        dist.all_reduce(everywhere)
        return bool(everywhere > 0)

    def _validate_one(self, dataset: Any) -> tuple[float, float]:
        """(loss in nats per token, bits per byte) of one dataset's first samples."""
        training = self.config.training
        sampler = PaddedSampler(
            min(training.validation_samples, len(dataset)),
            micro_batch=training.micro_batch,
            replica=self.replica,
            replicas=self.facts.replicas,
            multiple=self.config.parallel.pipeline if len(self.training.chunks) > 1 else 1,
        )
        masked = MaskedDataset(dataset)
        batches = [self._validation_batches(masked, sampler) for _ in self.training.chunks]
        nats, nats_per_byte = self.stepper.validate(batches, len(sampler), self.token_bytes)
        return nats, nats_per_byte / torch.tensor(2.0).log().item()

    def _validation_batches(self, dataset: Dataset, sampler: PaddedSampler) -> Iterator[Batch]:
        """Micro-batches of one validation of one dataset."""
        batches = micro_batches(
            dataset,
            sampler,
            workers=0,
            device=self.device,
            on_host=self.stepper.on_host,
            vocabulary=self.facts.vocabulary,
        )
        for number, batch in enumerate(batches, 1):
            self.guards.watchdog.beat(f"validation at step {self.state.step}, micro-batch {number}")
            yield batch

    def _save(self) -> None:
        """Start a checkpoint of this step; it is written while training goes on."""
        self._log()
        self.guards.watchdog.beat(f"saving step {self.state.step}")
        self.saver.save(self.state)

    def _report_checkpoints(self, outcomes: list[checkpoint.Outcome]) -> None:
        """Tell of checkpoints that were written or could not be; the next record has the figures of the last one."""
        for outcome in outcomes:
            if outcome.error is None:
                say(f"checkpoint {outcome.checkpoint} in {duration(outcome.seconds)}")
            else:
                self.failed_checkpoints += 1
                say(
                    f"warning: checkpoint {outcome.checkpoint} could not be written ({outcome.error}): training goes "
                    "on, earlier checkpoints are kept, and another is written when the next is due"
                )
            self.checkpoint_record = {
                "checkpoint/seconds": outcome.seconds,
                "checkpoint/stall_seconds": outcome.stall_seconds,
                "checkpoint/bytes": outcome.bytes,
                "checkpoint/failures": self.failed_checkpoints,
            }

    def _finish_checkpoint(self) -> None:
        """Wait for the checkpoint in flight. Raises UserError when it could not be written."""
        self.guards.watchdog.beat("waiting for the last checkpoint")
        self._report_checkpoints(self.saver.finish())
        if self.checkpoint_record:
            self._write(self.checkpoint_record)
            self.checkpoint_record = {}

    def _totals(self) -> dict[str, int]:
        """FLOPs so far in the three conventions, summed over the phases."""
        finished, left = self.state.finished_pairs, self.state.tokens
        totals = Counter[str]()
        for phase, pairs in zip(self.schedule.phases, [*finished, self.state.pairs - sum(finished)], strict=False):
            tokens = min(left, phase.steps * self.facts.tokens_per_step)
            totals.update(self.facts.counters[phase.length].training(tokens, pairs))
            left -= tokens
        return dict(totals)

    def _write(self, record: dict[str, Any]) -> None:
        """Add the counters every line has, and append to metrics.jsonl."""
        if self.metrics is not None:
            state = self.state
            head = {"step": state.step, "tokens": state.tokens, "seconds": state.seconds}
            self.metrics.write({**head, **self._totals(), **record})


def _due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps (0 = only at the end) happens now."""
    return interval > 0 and step % interval == 0


def _memory(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

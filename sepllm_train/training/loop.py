"""The training loop: steps, validation, checkpoints, metrics."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from torch.utils.data import Dataset

from sepllm_train.config.schema import Config
from sepllm_train.console import duration, say
from sepllm_train.data.loader import Batch, MaskedDataset, MicroBatchSampler, PaddedSampler, micro_batches
from sepllm_train.metrics.log import MetricsLog
from sepllm_train.metrics.peak import peak_tflops
from sepllm_train.training import checkpoint
from sepllm_train.training.progress import StepProgress
from sepllm_train.training.report import Facts, StepLine
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
        state: TrainState,
        *,
        metrics: MetricsLog | None,
        run_folder: Any,
        identities: dict[str, Any],
        token_bytes: list[int],
        device: torch.device,
    ) -> None:
        self.config = config
        self.facts = facts
        self.training = training
        self.stepper = stepper
        self.state = state
        self.metrics = metrics
        self.run_folder = run_folder
        self.identities = identities
        self.device = device
        self.token_bytes = torch.tensor(token_bytes, device=device)
        self.replica = parallel_state.get_data_parallel_rank()
        self.micro_batches = config.training.global_batch // (config.training.micro_batch * facts.replicas)
        self.first_step = state.step
        self.began = time.perf_counter()
        self.last: StepResult
        self._new_interval()

    def run(self, dataset: Dataset, validation: dict[str, Dataset]) -> None:
        """Train to training.steps, validating and saving on the way and at the end."""
        training = self.config.training
        iterators = [self._training_batches(dataset) for _ in self.training.chunks]
        if self.state.step == 0 and training.validation_interval > 0:
            self._validate(validation)
        progress = StepProgress(self.micro_batches, training.steps)
        while self.state.step < training.steps:
            self._step(iterators, progress)
            step, last = self.state.step, self.state.step == training.steps
            if last or step % self.config.logging.interval == 0:
                self._log()
            if last or _due(step, training.validation_interval):
                self._validate(validation)
            if last or _due(step, training.checkpoint_interval):
                self._save()

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
        return micro_batches(dataset, sampler, workers=self.config.data.workers, device=self.device)

    def _step(self, iterators: list[Iterator[Batch]], progress: StepProgress) -> None:
        """One optimizer step; sums stay on the device until the interval is logged."""
        begin = time.perf_counter()
        progress.begin(self.state.step + 1)
        result = self.stepper.train(iterators, self.micro_batches, progress.micro_batch)
        progress.end()
        self.sums += torch.stack((result.loss, self._counted, result.pairs.double()))
        self.last = result
        self.skipped += result.skipped
        self.interval_steps += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.interval_seconds += time.perf_counter() - begin
        self.state.step += 1

    def _new_interval(self) -> None:
        """Start the sums between two log lines: losses, micro-batches behind them, pairs (f64 [3])."""
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        holds_loss = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self._counted = torch.tensor(float(self.micro_batches * holds_loss), dtype=torch.float64, device=self.device)
        self.interval_steps = 0
        self.interval_seconds = 0.0
        self.skipped = 0

    def _log(self) -> None:
        """Reduce the interval over ranks, move it into the counters, write a line."""
        if not self.interval_steps:
            return
        loss, count, pairs = reduce_over_ranks(self.sums)
        tokens = self.interval_steps * self.facts.tokens_per_step
        seconds = self.interval_seconds
        self.state.tokens += tokens
        self.state.pairs += round(pairs)
        self.state.seconds += seconds
        share = self.facts.counter.attended_share(tokens, round(pairs))
        flops = self.facts.counter.training(tokens, round(pairs))["flops/model"]
        mfu = self._mfu(flops / seconds)
        record = {
            "train/loss": loss / count,
            "train/grad_norm": self.last.grad_norm,
            "train/lr": self.last.learning_rate,
            "train/tokens_per_second": tokens / seconds,
            "train/step_seconds": seconds / self.interval_steps,
            "train/attended_share": share,
            "train/skipped_steps": self.skipped,
            "train/memory_bytes": _memory(self.device),
            **({} if mfu is None else {"train/mfu": mfu}),
        }
        self._write(record)
        elapsed = time.perf_counter() - self.began
        left = elapsed / (self.state.step - self.first_step) * (self.config.training.steps - self.state.step)
        line = StepLine(
            self.state.step,
            self.config.training.steps,
            record["train/loss"],
            self.last.grad_norm,
            self.last.learning_rate,
            record["train/tokens_per_second"],
            mfu,
            self._totals()["flops/model"],
            share,
            left,
        )
        say(str(line) + (f" | {self.skipped} steps skipped (overflow)" if self.skipped else ""))
        self._new_interval()

    def _mfu(self, flops_per_second: float) -> float | None:
        """flops/model per second over the peak of all devices; None where the peak is not known."""
        peak = self.config.logging.peak_tflops
        if peak is None and self.device.type == "cuda":
            peak = peak_tflops(torch.cuda.get_device_name(self.device))
        grid = self.config.parallel.tensor * self.config.parallel.pipeline * self.facts.replicas
        return None if peak is None else flops_per_second / (peak * 1e12 * grid)

    def _validate(self, datasets: dict[str, Dataset]) -> None:
        """Loss of each held-out dataset, and their mean over tokens of equal count."""
        if not datasets or self.config.training.validation_samples == 0:
            return
        self._log()
        begin = time.perf_counter()
        record: dict[str, float] = {}
        for name, dataset in datasets.items():
            nats, per_byte = self._validate_one(dataset)
            record |= {f"val/{name}/loss": nats, f"val/{name}/bits_per_byte": per_byte}
        for key in ("loss", "bits_per_byte"):
            record[f"val/{key}"] = sum(record[f"val/{name}/{key}"] for name in datasets) / len(datasets)
        record["val/seconds"] = time.perf_counter() - begin
        self._write(record)
        say(
            f"validation at step {self.state.step}: loss {record['val/loss']:.4f}, "
            f"{record['val/bits_per_byte']:.4f} bits per byte, {duration(record['val/seconds'])}"
        )

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
        batches = [micro_batches(masked, sampler, workers=0, device=self.device) for _ in self.training.chunks]
        nats, nats_per_byte = self.stepper.validate(batches, len(sampler), self.token_bytes)
        return nats, nats_per_byte / torch.tensor(2.0).log().item()

    def _save(self) -> None:
        """Write a checkpoint of this step."""
        self._log()
        begin = time.perf_counter()
        target = checkpoint.save(
            self.run_folder, self.training, self.state, self.identities, keep=self.config.training.keep_checkpoints
        )
        say(f"checkpoint {target} in {duration(time.perf_counter() - begin)}")

    def _totals(self) -> dict[str, int]:
        """FLOPs so far in the three conventions."""
        return self.facts.counter.training(self.state.tokens, self.state.pairs)

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

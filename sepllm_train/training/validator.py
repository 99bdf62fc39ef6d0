"""Validation: loss and bits per byte of each held-out dataset."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from sepllm_train.base.console import duration, say
from sepllm_train.data.loader import Batch, MaskedDataset, PaddedSampler, micro_batches
from sepllm_train.training.live_run import LiveRun
from sepllm_train.training.step_logger import StepLogger


class Validator:
    """Validates a run on `datasets` with its base pattern and whole length. Every rank calls it at the same steps.

    `token_bytes`: UTF-8 bytes of each vocabulary entry. `loss` is that of the last validation, the mean of the
    datasets in nats per token, None before the first one.
    """

    def __init__(
        self, run: LiveRun, logger: StepLogger, datasets: dict[str, Dataset], token_bytes: Sequence[int]
    ) -> None:
        self.run = run
        self.logger = logger
        self.datasets = datasets
        self.token_bytes = torch.tensor(token_bytes, device=run.device)
        self.loss: float | None = None

    def validate(self) -> None:
        """Log the loss of each dataset, and their mean; nothing without datasets or samples."""
        run = self.run
        if not self.datasets or run.config.training.validation_samples == 0:
            return
        self.logger.log()
        run.stepper.use(run.schedule.base, run.schedule.length)
        begin = time.perf_counter()
        record: dict[str, float] = {}
        for name, dataset in self.datasets.items():
            nats, per_byte = self._losses(dataset)
            record |= {f"val/{name}/loss": nats, f"val/{name}/bits_per_byte": per_byte}
        for key in ("loss", "bits_per_byte"):
            record[f"val/{key}"] = sum(record[f"val/{name}/{key}"] for name in self.datasets) / len(self.datasets)
        self.loss = record["val/loss"]
        record["val/seconds"] = time.perf_counter() - begin
        self.logger.write(record)
        say(
            f"validation at step {run.state.step}: loss {record['val/loss']:.4f}, "
            f"{record['val/bits_per_byte']:.4f} bits per byte, {duration(record['val/seconds'])}"
        )

    def _losses(self, dataset: Any) -> tuple[float, float]:
        """(loss in nats per token, bits per byte) of one dataset's first samples."""
        run = self.run
        chunks, settings = run.training.chunks, run.config.training
        sampler = PaddedSampler(
            min(settings.validation_samples, len(dataset)),
            micro_batch=settings.micro_batch,
            replica=run.replica,
            replicas=run.facts.replicas,
            multiple=run.config.parallel.pipeline if len(chunks) > 1 else 1,
        )
        masked = MaskedDataset(dataset)
        batches = [self._batches(masked, sampler) for _ in chunks]
        nats, nats_per_byte = run.stepper.validate(batches, len(sampler), self.token_bytes)
        return nats, nats_per_byte / torch.tensor(2.0).log().item()

    def _batches(self, dataset: Dataset, sampler: PaddedSampler) -> Iterator[Batch]:
        """Micro-batches of one validation of one dataset."""
        run = self.run
        batches = micro_batches(
            dataset,
            sampler,
            workers=0,
            device=run.device,
            on_host=run.stepper.on_host,
            vocabulary=run.facts.vocabulary,
        )
        for number, batch in enumerate(batches, 1):
            run.guards.watchdog.beat(f"validation at step {run.state.step}, micro-batch {number}")
            yield batch

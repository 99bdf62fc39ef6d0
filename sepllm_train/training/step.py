"""One optimizer step and one validation, through megatron-core's pipeline schedules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from sep_attention import AttentionPlan, attended_pairs
from torch import Tensor

from sepllm_train.attention_pattern import AttentionPattern
from sepllm_train.config.schema import Config
from sepllm_train.data.loader import Batch
from sepllm_train.training.setup import Training, learning_rate

Progress = Callable[[int], None]


@dataclass(frozen=True)
class StepResult:
    """Outcome of a step on this rank, before any reduction over ranks.

    `loss` f64: sum of the micro-batches' mean losses (nats per token), 0 off the last pipeline stage.
    `pairs` i64: visible pairs of this rank's sequences, summed over all layers of the model. Both on the device.
    """

    loss: Tensor
    pairs: Tensor
    grad_norm: float
    learning_rate: float
    skipped: bool


class Stepper:
    """Runs steps of a configuration on this rank's model chunks."""

    def __init__(self, config: Config, pattern: AttentionPattern, training: Training, device: torch.device) -> None:
        self.config = config
        self.training = training
        self.pattern = pattern
        self.device = device
        self.schedule = get_forward_backward_func()
        self.layer_groups = Counter(pattern.layers)
        length = config.data.sequence_length
        self.positions = torch.arange(length, device=device).expand(config.training.micro_batch, length)

    def train(self, batches: list[Iterator[Batch]], micro_batches: int, progress: Progress) -> StepResult:
        """Forward and backward over `micro_batches` of each chunk's iterator, then the optimizer."""
        training = self.training
        for chunk in training.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        training.optimizer.zero_grad()
        pairs = torch.zeros((), dtype=torch.int64, device=self.device)
        done = Counter[str]()

        def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
            batch = next(iterator)
            plan = self.pattern.plan(batch["separator_class"], batch["document_start"])
            if model is training.chunks[0]:
                pairs.add_(self._pairs(plan))
                done["micro"] += 1
                progress(done["micro"])
            return model(batch["tokens"], self.positions, plan, labels=batch["labels"]), _mean_loss

        losses = self._run(forward_step, batches, micro_batches, forward_only=False)
        rate = learning_rate(training.optimizer)
        updated, grad_norm, _ = training.optimizer.step()
        # Also after a skipped update (fp16 overflow): the rate belongs to the step, not to the update.
        training.scheduler.step(increment=1)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for loss in losses:
            total += loss["loss"]
        return StepResult(total, pairs, float(grad_norm or 0.0), rate, not updated)

    @torch.no_grad()
    def validate(self, batches: list[Iterator[Batch]], micro_batches: int, token_bytes: Tensor) -> tuple[float, float]:
        """(nats per token, nats per UTF-8 byte) over the counted samples of every rank.

        `token_bytes`: i64 [V], bytes of each vocabulary entry.
        """
        for chunk in self.training.chunks:
            chunk.eval()

        def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
            batch = next(iterator)
            plan = self.pattern.plan(batch["separator_class"], batch["document_start"])
            output = model(batch["tokens"], self.positions, plan, labels=batch["labels"])

            def sums(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                counted = batch["counted"][:, None].double()
                nats = (losses.double() * counted).sum()
                tokens = (counted * torch.ones_like(losses, dtype=torch.float64)).sum()
                size = (token_bytes[batch["labels"]].double() * counted).sum()
                return losses.float().mean(), {"sums": torch.stack((nats, tokens, size))}

            return output, sums

        results = self._run(forward_step, batches, micro_batches, forward_only=True)
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        for result in results:
            totals += result["sums"]
        dist.all_reduce(totals)
        nats, tokens, size = totals.tolist()
        return nats / tokens, nats / size if size else float("nan")

    def _run(
        self, forward_step: Callable, batches: list[Iterator[Batch]], micro_batches: int, *, forward_only: bool
    ) -> list[dict[str, Any]]:
        """Call megatron-core's schedule; the last stage gets what its loss functions returned, others nothing."""
        chunks = self.training.chunks
        single = len(chunks) == 1
        return self.schedule(
            forward_step_func=forward_step,
            data_iterator=batches[0] if single else batches,
            model=chunks[0] if single else chunks,
            num_microbatches=micro_batches,
            seq_length=self.config.data.sequence_length,
            micro_batch_size=self.config.training.micro_batch,
            forward_only=forward_only,
        )

    def _pairs(self, plan: AttentionPlan) -> Tensor:
        """Visible pairs of a micro-batch, summed over sequences and all layers: i64 scalar."""
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for layer, count in self.layer_groups.items():
            total += count * attended_pairs(plan, layer.window, layer.horizons).sum()
        return total


def _mean_loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over the tokens of a micro-batch; the schedule divides the first value in place, so the log gets a copy."""
    loss = losses.float().mean()
    return loss, {"loss": loss.detach().clone()}


def reduce_over_ranks(values: Tensor) -> list[float]:
    """Sums over data-parallel replicas of `values` = (loss sum, count of micro-batches behind it, pairs).

    Every tensor-parallel rank and, for pairs, every stage holds a copy: the sums over all ranks are divided by the
    number of copies. The losses come from the last stage only.
    """
    total = values.double()
    dist.all_reduce(total)
    copies = parallel_state.get_tensor_model_parallel_world_size()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    loss, count, pairs = total.tolist()
    return [loss / copies, count / copies, pairs / (copies * stages)]

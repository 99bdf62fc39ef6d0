"""One optimizer step and one validation, through megatron-core's pipeline schedules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from sep_attention import AttentionPlan, attended_pairs
from torch import Tensor

from sepllm_train.config.schema import Config
from sepllm_train.data.loader import Batch
from sepllm_train.distributed.context import ContextPlan, part_of
from sepllm_train.distributed.launch import context_group
from sepllm_train.model.attention import SeparatorAttention
from sepllm_train.model.pattern import AttentionPattern
from sepllm_train.training.clock import StepClock
from sepllm_train.training.schedules import cut
from sepllm_train.training.setup import Training, learning_rate, set_schedule
from sepllm_train.training.update import Judge, not_finite, update

Progress = Callable[[int], None]
# Numbers of this rank that are summed over all ranks with the step's reduction.
Own = Callable[[], list[float]]


@dataclass(frozen=True)
class StepResult:
    """Outcome of a step.

    Of this rank, before any reduction: `loss` f64, the sum of the micro-batches' mean losses (nats per token), and
    `counted` f64, the micro-batches behind it, both 0 off the last pipeline stage and over this rank's tokens only
    under context parallelism. Where labels are masked, they are 0 in a mean over all tokens, and a micro-batch is
    counted by the share of its labels that are not. `pairs` i64, visible pairs of its whole sequences, summed over all
    layers of the model; `layer_pairs` i64 [layers], those of each layer. All on the device. `context_bytes`: keys,
    values and gradients that it sent to other context-parallel ranks.
    The same on every rank: `grad_norm` before clipping; `skipped`, whether fp16 overflowed; `mean_loss` of the batch;
    `bad`, why the step was left out (None when it was not); `sums` of the numbers of `Own`.
    """

    loss: Tensor
    counted: Tensor
    pairs: Tensor
    layer_pairs: Tensor
    context_bytes: int
    grad_norm: float
    learning_rate: float
    skipped: bool
    mean_loss: float
    bad: str | None
    sums: list[float]


class _Inputs(NamedTuple):
    """A micro-batch for the model on this rank: tokens, labels, positions i64 [B, S], loss_mask bool [B, S].

    Positions are None where they are those of the sequence, the mask is None where every label counts. Under context
    parallelism S is this rank's part.
    """

    tokens: Tensor
    labels: Tensor
    plan: AttentionPlan | ContextPlan
    positions: Tensor | None
    loss_mask: Tensor | None


class Stepper:
    """Runs steps of a configuration on this rank's model chunks."""

    def __init__(self, config: Config, pattern: AttentionPattern, training: Training, device: torch.device) -> None:
        self.config = config
        self.training = training
        self.device = device
        self.schedule = get_forward_backward_func()
        self._attention = [
            part for chunk in training.modules for part in chunk.modules() if isinstance(part, SeparatorAttention)
        ]
        # Times the parts of the steps of `train`, for whoever begins and ends them on it.
        self.clock = StepClock(device)
        get_model_config(training.chunks[0]).timers = self.clock
        self.context = context_group()
        # Entries of a batch from which exchanges are planned.
        self.on_host = ("separator_class", "document_start") if self.context else ()
        self.use(pattern, config.data.sequence_length)

    def use(self, pattern: AttentionPattern, length: int) -> None:
        """Attend by `pattern` from now on, and cut samples into sequences of `length` tokens.

        Patterns may differ in the windows of their layers alone.
        """
        self.pattern = pattern
        self.length = length
        self.micro_batch = self.config.training.micro_batch * self.config.data.sequence_length // length
        for attention in self._attention:
            attention.layer = pattern.layers[attention.number]

    def train(
        self,
        batches: list[Iterator[Batch]],
        micro_batches: int,
        progress: Progress,
        *,
        judge: Judge = not_finite,
        own: Own = list,
    ) -> StepResult:
        """Forward and backward over `micro_batches` of each chunk's iterator, then the optimizer.

        The optimizer is left out when `judge` objects. `own` is asked for this rank's numbers when forward and
        backward are done.
        """
        training = self.training
        for chunk in training.chunks:
            if not chunk.training:
                chunk.train()
            chunk.zero_grad_buffer()
        training.optimizer.zero_grad()
        layer_pairs = torch.zeros(len(self.pattern.layers), dtype=torch.int64, device=self.device)
        done = Counter[str]()

        def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
            with self.clock.part("data_wait"):
                batch = next(iterator)
            with self.clock.part("plan"):
                tokens, labels, plan, positions, loss_mask = self._inputs(batch)
            if model is training.chunks[0]:
                layer_pairs.add_(self._layer_pairs(plan))
                done["micro"] += 1
                progress(done["micro"])
            output = model(tokens, plan, labels=labels, positions=positions)
            return output, partial(self._mean_loss, loss_mask=loss_mask)

        losses = self._run(forward_step, batches, micro_batches, forward_only=False)
        lr = learning_rate(training.scheduler)
        with self.clock.part("optimizer"):
            total, counted = torch.zeros(2, dtype=torch.float64, device=self.device)
            for loss in losses:
                total += loss["loss"]
                counted += loss["counted"]
            everywhere = micro_batches * dist.get_world_size() // self.config.parallel.pipeline
            done_update = update(training.optimizer, total, counted, everywhere, own(), judge)
        # Also after a skipped update: the learning rate belongs to the step, not to the update.
        set_schedule(training, training.step + 1)
        overflow = done_update.overflow and done_update.bad is None
        return StepResult(
            total,
            counted,
            layer_pairs.sum(),
            layer_pairs,
            self.context.take_sent_bytes() if self.context else 0,
            done_update.grad_norm,
            lr,
            overflow,
            done_update.loss,
            done_update.bad,
            done_update.sums,
        )

    @torch.no_grad()
    def validate(self, batches: list[Iterator[Batch]], micro_batches: int, token_bytes: Tensor) -> tuple[float, float]:
        """(nats per token, nats per UTF-8 byte) over the counted labels of the counted samples of every rank; nan
        without any.

        `token_bytes`: i64 [V], bytes of each vocabulary entry.
        """
        for chunk in self.training.chunks:
            chunk.eval()
        if self.config.data.mask_boundary_loss:
            # The end of a document takes back bytes of the label after it (`Corpus.prefix_bytes`), which is masked.
            token_bytes = token_bytes.clamp(min=0)

        def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
            batch = next(iterator)
            tokens, labels, plan, positions, loss_mask = self._inputs(batch)
            output = model(tokens, plan, labels=labels, positions=positions)

            def sums(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                counted = batch["counted"][:, None].double().expand_as(losses)
                if loss_mask is not None:
                    counted = counted * loss_mask
                nats = (losses.double() * counted).sum()
                tokens = counted.sum()
                size = (token_bytes[labels].double() * counted).sum()
                return losses.float().mean(), {"sums": torch.stack((nats, tokens, size))}

            return output, sums

        results = self._run(forward_step, batches, micro_batches, forward_only=True)
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        for result in results:
            totals += result["sums"]
        dist.all_reduce(totals)
        if self.context:
            self.context.take_sent_bytes()
        nats, tokens, size = totals.tolist()
        return nats / tokens if tokens else float("nan"), nats / size if size else float("nan")

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
            seq_length=self.length,
            micro_batch_size=self.micro_batch,
            forward_only=forward_only,
        )

    def _inputs(self, batch: Batch) -> _Inputs:
        """The inputs of a micro-batch of sequences of `length` tokens.

        Under context parallelism the batch's `separator_class` and `document_start` are on the host, where the exchange
        is planned.
        """
        batch = cut(batch, self.length)
        plan = self.pattern.plan(batch["separator_class"], batch["document_start"])
        positions = self._part(self.pattern.positions(batch["document_start"]))
        return _Inputs(
            self._part(batch["tokens"]),
            self._part(batch["labels"]),
            plan if self.context is None else ContextPlan(plan, self.context, self.device),
            None if positions is None else positions.to(self.device),
            self._part(batch.get("loss_mask")),
        )

    def _part(self, tensor: Any) -> Any:
        """The part of [B, S] that belongs to this context-parallel rank; None of None."""
        if self.context is None or tensor is None:
            return tensor
        return part_of(tensor, self.context.rank, self.context.size)

    def _mean_loss(self, losses: Tensor, loss_mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss to differentiate, and for the log the mean over this rank's tokens of a micro-batch and the share of
        them that counts.

        Masked labels are 0 in the mean: how many count in the whole batch is known after its last micro-batch, and
        `update` makes up for it. Gradients are averaged over context-parallel ranks as over replicas, although theirs
        are of parts of one mean. The schedule makes up for that by multiplying the loss by the number of ranks, so this
        rank's part of the mean is due here. The schedule works in place: the log gets a tensor of its own.
        """
        losses, counted = losses.float(), torch.ones(())
        if loss_mask is not None:
            losses, counted = losses.where(loss_mask, 0.0), loss_mask.double().mean()
        loss = losses.mean()
        return loss / (self.context.size if self.context else 1), {"loss": loss.detach(), "counted": counted}

    def _layer_pairs(self, plan: AttentionPlan | ContextPlan) -> Tensor:
        """Visible pairs of a micro-batch, summed over whole sequences, in each layer: i64 [layers]."""
        whole = plan.whole if isinstance(plan, ContextPlan) else plan
        # Layers that attend alike have the same pairs: they are counted once.
        pairs = {
            layer: attended_pairs(whole, layer.window, layer.horizons).sum()
            for layer in dict.fromkeys(self.pattern.layers)
        }
        return torch.stack([pairs[layer] for layer in self.pattern.layers])


def reduce_over_ranks(values: Tensor, context_bytes: int) -> list[float]:
    """Sums over data-parallel replicas of `values` = (loss sum, micro-batches counted behind it, pairs, and if wanted
    more counts of pairs), and last the mean over all ranks of `context_bytes`, which each has sent to context-parallel
    ones.

    Every tensor-parallel rank and, for pairs, every stage holds a copy: the sums over all ranks are divided by the
    number of copies. The losses come from the last stage only. Context-parallel ranks hold copies of the pairs, and
    losses and counts of equal parts of the tokens, of which the mean is wanted.
    """
    total = torch.cat((values.double(), torch.tensor([context_bytes], device=values.device)))
    dist.all_reduce(total)
    copies = parallel_state.get_tensor_model_parallel_world_size() * parallel_state.get_context_parallel_world_size()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    loss, count, *pairs, sent = total.tolist()
    whole = [number / (copies * stages) for number in pairs]
    return [loss / copies, count / copies, *whole, sent / dist.get_world_size()]

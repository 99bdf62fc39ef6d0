"""Losses of a trained model, token by token, under the attention pattern of training or another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sep_attention import attended_pairs
from torch import Tensor
from torch.utils.data import Dataset

from sepllm_train.analysis.recall import far_recall
from sepllm_train.base.statistics import Losses, token_mean
from sepllm_train.config.schema import require
from sepllm_train.model.attention import SeparatorAttention
from sepllm_train.model.gpt import SepGPTModel
from sepllm_train.model.pattern import AttentionPattern
from sepllm_train.runs.folder import Run, alone, describe, load_run

Advance = Callable[[], object]
# The paper's n, where a model has no window of its own.
DEFAULT_WINDOW = 64


class Pieces(Dataset):
    """Samples of `dataset` cut into consecutive ones of `length` tokens, which must divide theirs.

    The predicted tokens are the same; what lies before its piece is out of a query's sight.
    """

    def __init__(self, dataset: Any, length: int) -> None:
        self.dataset = dataset
        self.length = length
        self.parts = len(dataset[0]["tokens"]) // length

    def __len__(self) -> int:
        return len(self.dataset) * self.parts

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        sample, part = divmod(number, self.parts)
        start = part * self.length
        cut = {key: value[start : start + self.length] for key, value in self.dataset[sample].items()}
        return cut | {"document_start": (cut["document_start"] - start).clamp(min=0)}


def core_attentions(model: SepGPTModel) -> list[SeparatorAttention]:
    """The attention of each layer of a model on one pipeline stage, from the first."""
    return [layer.self_attention.core_attention for layer in model.decoder.layers]


@contextmanager
def attending(model: SepGPTModel, pattern: AttentionPattern) -> Iterator[None]:
    """Let a model attend by another pattern inside the block; its plans must be those of `pattern`.

    Weights, learned sinks and query-key norms stay. Raises ValueError for a pattern of another number of layers.
    """
    cores = core_attentions(model)
    before = [core.layer for core in cores]
    try:
        for core, layer in zip(cores, pattern.layers, strict=True):
            core.layer = layer
        yield
    finally:
        for core, layer in zip(cores, before, strict=True):
            core.layer = layer


@torch.no_grad()
def evaluate(
    model: SepGPTModel,
    pattern: AttentionPattern,
    dataset: Any,
    samples: int,
    advance: Advance = lambda: None,
) -> Losses:
    """Losses of the first `samples` samples of `dataset`, one forward pass each, in the precision of the weights.

    Calls `advance` after each. Raises UserError for more samples than there are.
    """
    require(
        1 <= samples <= len(dataset), f"{samples} samples were asked for, and there are {len(dataset):,} held-out ones."
    )
    device = next(model.parameters()).device
    nats, pairs = [], []
    with attending(model, pattern):
        for number in range(samples):
            sample = {key: value[None].to(device) for key, value in dataset[number].items()}
            plan = pattern.plan(sample["separator_class"], sample["document_start"])
            nats.append(model(sample["tokens"], plan, labels=sample["labels"]).float().cpu())
            pairs.append(sum(int(attended_pairs(plan, layer.window, layer.horizons)) for layer in pattern.layers))
            advance()
    length = nats[0].shape[1]
    return Losses(torch.cat(nats), torch.tensor(pairs), len(pattern.layers) * length * (length + 1) // 2)


def text_of(dataset: Any, samples: int) -> dict[str, Tensor]:
    """What the first `samples` samples hold, stacked: tokens, labels, separator_class, document_start [N, S]."""
    items = [dataset[number] for number in range(samples)]
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def usual_window(pattern: AttentionPattern) -> int:
    """The largest window of the layers that are not full; the paper's 64 where all of them are."""
    return max((layer.window for layer in pattern.layers if not layer.full), default=DEFAULT_WINDOW)


def evaluate_run(
    folder: Path | str,
    data_prefix: str | None = None,
    samples: int | None = None,
    *,
    recall_window: int | None = None,
    held_out: float | None = None,
    step: int | None = None,
    advance: Advance = lambda: None,
) -> dict[str, Any]:
    """Held-out losses of a run's checkpoint under its own pattern, with standard errors over samples.

    data_prefix, held_out and step as in `load_run`; samples: at most so many (None: as many as validation in training
    takes). recall_window: n of the far-recall tokens, None for the run's own (64 for a dense one): give runs that are
    compared the same. Works in or outside of `alone`.

    Gives loss, far_recall_loss and other_loss in nats per token, each with an `_error`; far_recall_share of the
    tokens; attended_share of the causal triangle; recall_window; tokens; and what `describe` tells. Raises UserError
    as `load_run` does.
    """
    require(recall_window is None or recall_window >= 1, f"recall_window={recall_window} must be at least 1.")
    with alone():
        run, count = AnalysisSource(
            Path(folder), step=step, data=data_prefix, held_out=held_out, samples=samples
        ).open()
        losses = evaluate(run.model, run.pattern, run.validation, count, advance)
        text = text_of(run.validation, count)
    window = recall_window or usual_window(run.pattern)
    far = far_recall(text["tokens"], text["labels"], window)
    result: dict[str, Any] = {}
    for name, mask in (("", None), ("far_recall_", far), ("other_", ~far)):
        result[f"{name}loss"], result[f"{name}loss_error"] = token_mean(losses.nats, mask)
    return {
        **result,
        "far_recall_share": float(far.double().mean()),
        "attended_share": losses.attended_share,
        "recall_window": window,
        "tokens": losses.nats.numel(),
        **describe(run, count),
    }


@dataclass(frozen=True)
class AnalysisSource:
    """What is analysed: a checkpoint of the run in `folder`, on held-out samples.

    step, data, held_out: as in `load_run`; samples: as in `samples_of`.
    """

    folder: Path
    step: int | None = None
    data: str | None = None
    held_out: float | None = None
    samples: int | None = None

    def open(self) -> tuple[Run, int]:
        """The run and how many samples to take, inside `alone`. Raises UserError as `load_run` and `samples_of` do."""
        run = load_run(self.folder, step=self.step, data=self.data, held_out=self.held_out)
        return run, samples_of(run, self.samples)


def samples_of(run: Run, asked: int | None) -> int:
    """How many samples to take: `asked`, or as many as validation in training does, and no more than there are.

    Raises UserError when none are asked for.
    """
    require(asked is None or asked >= 1, f"--samples {asked} must be at least 1.")
    return min(asked or run.config.training.validation_samples or 1, len(run.validation))

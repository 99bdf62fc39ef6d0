"""Loss of a trained model under other patterns: without a class of separators, with other windows and lengths.

The weights are those of training throughout. A loss that rises under another pattern says that this model used what
was taken away; it does not say what a model trained under that pattern would reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sepllm_train.analysis import loss_report
from sepllm_train.analysis.report import check_output, progress, write_report
from sepllm_train.base.statistics import Estimate, Losses, token_mean
from sepllm_train.config.schema import require
from sepllm_train.distributed.launch import alone
from sepllm_train.model.pattern import AttentionPattern, resolve_pattern
from sepllm_train.runs.evaluate import evaluate, recall_distance, stacked_reach, usual_window
from sepllm_train.runs.held_out import Pieces, held_out_samples, text_of
from sepllm_train.runs.open import TrainedRun
from sepllm_train.runs.variations import (
    CLASS_NAMES,
    base_attention,
    classes_of,
    equal_pairs_without_separators,
    pairs_of,
    with_window,
    without_classes,
)

FIRST_BUCKET = 16


@dataclass(frozen=True)
class Questions:
    """What to ask of a model. Windows and lengths in tokens; `attention` are KEY=VALUE overrides of the base pattern,
    from which the others are made."""

    drop_classes: bool = False
    windows: Sequence[int] = ()
    lengths: Sequence[int] = ()
    far_recall: bool = False
    attention: Sequence[str] = ()

    def check(self) -> None:
        """Raise UserError for windows or lengths that are none, or lengths that do not divide the longest."""
        for window in self.windows:
            require(window >= 1, f"--windows {window}: a window counts the token itself, so it is at least 1.")
        for length in self.lengths:
            require(length >= 1, f"--lengths {length} must be at least 1.")
            require(
                max(self.lengths) % length == 0,
                f"--lengths {length} does not divide {max(self.lengths)}: the longest sequences are cut into the "
                "shorter ones, so that all predict the same tokens.",
            )


@dataclass(eq=False)
class Job:
    """One evaluation to come: the pattern, and samples of `text` [N, S] to evaluate, `parts` of each."""

    pattern: AttentionPattern
    dataset: Any
    samples: int
    parts: int = 1
    losses: Losses | None = None

    def run(self, model: Any, advance: Callable[[], object]) -> None:
        """Evaluate; the parts of a sample are put together again, so that errors are those over whole samples."""
        found = evaluate(model, self.pattern, self.dataset, self.samples * self.parts, advance)
        self.losses = replace(
            found,
            nats=found.nats.view(self.samples, -1),
            pairs=found.pairs.view(self.samples, -1).sum(1),
            causal_pairs=found.causal_pairs * self.parts,
        )

    @property
    def result(self) -> Losses:
        """The losses, once `run` has been called."""
        assert self.losses is not None
        return self.losses


@dataclass
class LossAnalysis:
    """The jobs that answer `questions` about a run on `samples` samples, and the answers once they have run."""

    run: TrainedRun
    questions: Questions
    samples: int
    trained: Job = field(init=False)
    base: Job = field(init=False)
    dropped: dict[str, Job] = field(init=False, default_factory=dict)
    sweep: list[dict[str, Any]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        config, own = self.run.config, self.run.config.data.sequence_length
        self.model = self.run.model
        attention = base_attention(config.attention, self.questions.attention)
        pattern = resolve_pattern(attention, config.model.layers)
        self.text: dict[str, Tensor] = text_of(self.run.validation, self.samples)
        self.window = usual_window(pattern)
        self.trained = self._job(self.run.pattern)
        own_attention = replace(config.attention, window_choices=None)
        self.base = self.trained if attention == own_attention else self._job(pattern)
        if self.questions.drop_classes:
            self._plan_drops(pattern)
        lengths = sorted(set(self.questions.lengths)) or [own]
        if self.questions.windows or self.questions.lengths:
            self._plan_sweep(pattern, lengths, own)

    def _job(self, pattern: AttentionPattern) -> Job:
        return Job(pattern, self.run.validation, self.samples)

    def _plan_drops(self, pattern: AttentionPattern) -> None:
        """A job for each class of the base pattern that occurs, and one without any."""
        present = torch.bincount(self.text["separator_class"].flatten().long(), minlength=256)
        classes = [number for number in classes_of(pattern) if present[number]]
        require(
            bool(classes),
            "--drop-classes: the pattern keeps no separator that occurs in these samples; choose one that does with "
            "--attention pattern=sep separators=paper.",
        )
        self.dropped = {CLASS_NAMES[number]: self._job(without_classes(pattern, [number])) for number in classes}
        if len(classes) > 1:
            self.dropped["all of them"] = self._job(without_classes(pattern, classes))

    def _plan_sweep(self, pattern: AttentionPattern, lengths: list[int], own: int) -> None:
        """Jobs for each length and window: with separators, and without them at equal pairs."""
        longest = lengths[-1]
        dataset, samples = self.run.validation, self.samples
        if longest != own:
            config = self.run.config
            config = replace(config, data=replace(config.data, sequence_length=longest))
            dataset = held_out_samples(config, self.run.corpus)
            # As many tokens as elsewhere, but enough samples for an error.
            samples = min(len(dataset), max(2, self.samples * own // longest))
        windows = sorted(set(self.questions.windows)) or [self.window]
        for length in lengths:
            pieces = dataset if length == longest else Pieces(dataset, length)
            parts = longest // length
            text = text_of(pieces, samples * parts)
            trained = self.trained if pieces is self.run.validation else Job(self.run.pattern, pieces, samples, parts)
            for window in windows:
                with_separators = with_window(pattern, min(window, length))
                row = {"length": length, "window": window, "text": text, "trained": trained}
                row["separators"] = Job(with_separators, pieces, samples, parts)
                if pairs_of(with_separators, text) > pairs_of(_bare(with_separators), text):
                    bare, equal = equal_pairs_without_separators(with_separators, text)
                    row |= {"none": Job(bare, pieces, samples, parts), "equal_window": equal}
                self.sweep.append(row)

    @property
    def jobs(self) -> list[Job]:
        """Every evaluation, once."""
        swept = [job for row in self.sweep for job in row.values() if isinstance(job, Job)]
        return list({id(job): job for job in (self.trained, self.base, *self.dropped.values(), *swept)}.values())

    def answer(self, advance: Callable[[], object]) -> dict[str, Any]:
        """Run every job and give the answers; `advance` is called after each forward pass."""
        for job in self.jobs:
            job.run(self.model, advance)
        distance = recall_distance(self.text["tokens"], self.text["labels"])
        return {
            **self.run.describe(self.samples),
            "window": self.window,
            "trained_differs": self.base is not self.trained,
            "patterns": [_figures(name, job.result, self.trained.result) for name, job in self._named()],
            "positions": list(self._positions()),
            "far_recall": list(self._far_recall(distance)) if self.questions.far_recall else [],
            "classes": [self._drop(name, job, distance) for name, job in self.dropped.items()],
            "sweep": [self._row(row) for row in self.sweep],
        }

    def _named(self) -> list[tuple[str, Job]]:
        """The pattern of training, and the base pattern where it is another."""
        named = [("as trained", self.trained), ("base", self.base)]
        return named[:1] if self.base is self.trained else named

    def _positions(self) -> Iterator[dict[str, Any]]:
        """Loss by place in the sequence, in buckets that double."""
        length = self.text["tokens"].shape[1]
        start, stop = 0, min(FIRST_BUCKET, length)
        while start < length:
            row: dict[str, Any] = {"first": start, "last": stop - 1}
            row["trained"] = token_mean(self.trained.result.nats[:, start:stop])
            row["base"] = token_mean(self.base.result.nats[:, start:stop])
            yield row
            start, stop = stop, min(2 * stop, length)

    def _far_recall(self, distance: Tensor) -> Iterator[dict[str, Any]]:
        """Loss of far-recall tokens and of the others, under each pattern."""
        groups = {"far recall": distance > self.window, "other": distance <= self.window}
        reach = stacked_reach(self.window, self.run.config.model.layers)
        if (distance > reach).any():
            groups["far recall beyond the stacked windows"] = distance > reach
        without = [("base without separators", self.dropped["all of them"])] if "all of them" in self.dropped else []
        for name, job in [*self._named(), *without]:
            for group, mask in groups.items():
                change = token_mean(job.result.nats - self.trained.result.nats, mask)
                share = float(mask.double().mean())
                loss = token_mean(job.result.nats, mask)
                yield {"pattern": name, "tokens": group, "share": share, "loss": loss, "change": change}

    def _drop(self, name: str, job: Job, distance: Tensor) -> dict[str, Any]:
        """What dropping a class from the base pattern changes."""
        base, found = self.base.result, job.result
        removed = int((base.pairs - found.pairs).sum())
        change = token_mean(found.nats - base.nats)
        row = {
            "class": name,
            "change": change,
            "attended_share_lost": base.attended_share - found.attended_share,
            "removed_pairs_per_token": removed / base.nats.numel(),
            "per_thousand_pairs": _scaled(change, 1000 * base.nats.numel() / removed) if removed else None,
        }
        if self.questions.far_recall:
            row["far_recall_change"] = token_mean(found.nats - base.nats, distance > self.window)
        return row

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        """A length and window: losses with separators, and without them at equal pairs."""
        found = row["separators"].result
        result = {"length": row["length"], "window": row["window"], **_figures("", found, row["trained"].result)}
        result["trained_loss"] = token_mean(row["trained"].result.nats)
        masks: dict[str, Tensor | None] = {"": None}
        if self.questions.far_recall:
            far = recall_distance(row["text"]["tokens"], row["text"]["labels"]) > self.window
            masks["far_recall_"] = far.view(found.nats.shape)
            result["far_recall_loss"] = token_mean(found.nats, masks["far_recall_"])
        if "none" in row:
            bare = row["none"].result
            result |= {
                "equal_window": row["equal_window"],
                "equal_keys": _keys(bare),
                "equal_share": bare.attended_share,
            }
            for name, mask in masks.items():
                result[f"{name}equal_loss"] = token_mean(bare.nats, mask)
                result[f"{name}separators_gain"] = token_mean(bare.nats - found.nats, mask)
        return result


def _bare(pattern: AttentionPattern) -> AttentionPattern:
    return without_classes(pattern, classes_of(pattern))


def _keys(losses: Losses) -> float:
    """Visible pairs per token, summed over layers."""
    return int(losses.pairs.sum()) / losses.nats.numel()


def _figures(name: str, losses: Losses, reference: Losses) -> dict[str, Any]:
    """Loss, its change from `reference`, pairs per token over all layers, and share of one pattern."""
    return {
        "pattern": name,
        "loss": token_mean(losses.nats),
        "change": token_mean(losses.nats - reference.nats),
        "attended_share": losses.attended_share,
        "pairs_per_token": _keys(losses),
    }


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(estimate.mean * factor, estimate.error * factor)


def loss_command(run: TrainedRun, output: Path, questions: Questions, samples: int | None = None) -> dict[str, Any]:
    """Ask `questions` of a run's checkpoint, write the report to `output` and return the result.

    samples: as in `TrainedRun.sample_count`. Raises UserError for whatever cannot be answered, before anything is
    written.
    """
    check_output(output)
    questions.check()
    with alone():
        analysis = LossAnalysis(run, questions, run.sample_count(samples))
        passes = sum(job.samples * job.parts for job in analysis.jobs)
        with progress(passes, "sequence") as bar:
            result = analysis.answer(lambda: bar.update())
    write_report(output, "loss", result, loss_report.markdown(result), loss_report.figures(result))
    return result

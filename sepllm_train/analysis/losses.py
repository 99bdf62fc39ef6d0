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
from matplotlib.figure import Figure
from torch import Tensor

from sepllm_train.analysis import plots
from sepllm_train.analysis.output import READING, check_output, clear_of_zero, progress, shown, signed, write_report
from sepllm_train.base.statistics import Estimate, Losses
from sepllm_train.compare.tables import Table
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
class LossOptions:
    """Patterns to evaluate. Windows and lengths in tokens; `attention`: KEY=VALUE overrides of the base pattern, from
    which the others are made."""

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
class Evaluation:
    """An evaluation of a pattern on the first `samples` samples of `dataset`, each cut into `parts`; see `run`."""

    pattern: AttentionPattern
    dataset: Any
    samples: int
    parts: int = 1
    losses: Losses | None = None

    def run(self, model: Any, advance: Callable[[], object]) -> None:
        """Evaluate; the parts of a sample are joined again, so that errors are those over whole samples."""
        found = evaluate(model, self.pattern, self.dataset, self.samples * self.parts, advance)
        self.losses = replace(
            found,
            nats=found.nats.view(self.samples, -1),
            counted=None if found.counted is None else found.counted.view(self.samples, -1),
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
    """The evaluations that `options` ask for, of a run on `samples` samples, and the figures once they have run."""

    run: TrainedRun
    options: LossOptions
    samples: int
    trained: Evaluation = field(init=False)
    base: Evaluation = field(init=False)
    dropped: dict[str, Evaluation] = field(init=False, default_factory=dict)
    sweep: list[dict[str, Any]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        config, own = self.run.config, self.run.config.data.sequence_length
        self.model = self.run.model
        attention = base_attention(config.attention, self.options.attention)
        pattern = resolve_pattern(attention, config.model.layers)
        self.text: dict[str, Tensor] = text_of(self.run.validation, self.samples)
        self.window = usual_window(pattern)
        self.trained = self._job(self.run.pattern)
        own_attention = replace(config.attention, window_choices=None)
        self.base = self.trained if attention == own_attention else self._job(pattern)
        if self.options.drop_classes:
            self._plan_drops(pattern)
        lengths = sorted(set(self.options.lengths)) or [own]
        if self.options.windows or self.options.lengths:
            self._plan_sweep(pattern, lengths, own)

    def _job(self, pattern: AttentionPattern) -> Evaluation:
        return Evaluation(pattern, self.run.validation, self.samples)

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
        windows = sorted(set(self.options.windows)) or [self.window]
        for length in lengths:
            pieces = dataset if length == longest else Pieces(dataset, length)
            parts = longest // length
            text = text_of(pieces, samples * parts)
            trained = (
                self.trained if pieces is self.run.validation else Evaluation(self.run.pattern, pieces, samples, parts)
            )
            for window in windows:
                with_separators = with_window(pattern, min(window, length))
                row = {"length": length, "window": window, "text": text, "trained": trained}
                row["separators"] = Evaluation(with_separators, pieces, samples, parts)
                if pairs_of(with_separators, text) > pairs_of(_bare(with_separators), text):
                    bare, equal = equal_pairs_without_separators(with_separators, text)
                    row |= {"none": Evaluation(bare, pieces, samples, parts), "equal_window": equal}
                self.sweep.append(row)

    @property
    def jobs(self) -> list[Evaluation]:
        """Every evaluation, once."""
        swept = [job for row in self.sweep for job in row.values() if isinstance(job, Evaluation)]
        return list({id(job): job for job in (self.trained, self.base, *self.dropped.values(), *swept)}.values())

    def answer(self, advance: Callable[[], object]) -> dict[str, Any]:
        """Run every evaluation and return the figures; `advance` is called after each forward pass."""
        for job in self.jobs:
            job.run(self.model, advance)
        distance = recall_distance(self.text["tokens"], self.text["labels"])
        return {
            **self.run.describe(self.samples),
            "window": self.window,
            "trained_differs": self.base is not self.trained,
            "patterns": [_figures(name, job.result, self.trained.result) for name, job in self._named()],
            "positions": list(self._positions()),
            "far_recall": list(self._far_recall(distance)) if self.options.far_recall else [],
            "classes": [self._drop(name, job, distance) for name, job in self.dropped.items()],
            "sweep": [self._row(row) for row in self.sweep],
        }

    def _named(self) -> list[tuple[str, Evaluation]]:
        """The pattern of training, and the base pattern where it is another."""
        named = [("as trained", self.trained), ("base", self.base)]
        return named[:1] if self.base is self.trained else named

    def _positions(self) -> Iterator[dict[str, Any]]:
        """Loss by place in the sequence, in buckets that double."""
        length = self.text["tokens"].shape[1]
        start, stop = 0, min(FIRST_BUCKET, length)
        while start < length:
            row: dict[str, Any] = {"first": start, "last": stop - 1}
            row["trained"] = self.trained.result.places(start, stop).mean()
            row["base"] = self.base.result.places(start, stop).mean()
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
                change = job.result.change(self.trained.result, mask)
                share = float(mask.double().mean())
                loss = job.result.mean(mask)
                yield {"pattern": name, "tokens": group, "share": share, "loss": loss, "change": change}

    def _drop(self, name: str, job: Evaluation, distance: Tensor) -> dict[str, Any]:
        """Change in loss and in pairs when a class is dropped from the base pattern."""
        base, found = self.base.result, job.result
        removed = int((base.pairs - found.pairs).sum())
        change = found.change(base)
        row = {
            "class": name,
            "change": change,
            "attended_share_lost": base.attended_share - found.attended_share,
            "removed_pairs_per_token": removed / base.nats.numel(),
            "per_thousand_pairs": _scaled(change, 1000 * base.nats.numel() / removed) if removed else None,
        }
        if self.options.far_recall:
            row["far_recall_change"] = found.change(base, distance > self.window)
        return row

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        """A length and window: losses with separators, and without them at equal pairs."""
        found = row["separators"].result
        result = {"length": row["length"], "window": row["window"], **_figures("", found, row["trained"].result)}
        result["trained_loss"] = row["trained"].result.mean()
        masks: dict[str, Tensor | None] = {"": None}
        if self.options.far_recall:
            far = recall_distance(row["text"]["tokens"], row["text"]["labels"]) > self.window
            masks["far_recall_"] = far.view(found.nats.shape)
            result["far_recall_loss"] = found.mean(masks["far_recall_"])
        if "none" in row:
            bare = row["none"].result
            result |= {
                "equal_window": row["equal_window"],
                "equal_keys": _keys(bare),
                "equal_share": bare.attended_share,
            }
            for name, mask in masks.items():
                result[f"{name}equal_loss"] = bare.mean(mask)
                result[f"{name}separators_gain"] = bare.change(found, mask)
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
        "loss": losses.mean(),
        "change": losses.change(reference),
        "attended_share": losses.attended_share,
        "pairs_per_token": _keys(losses),
    }


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(estimate.mean * factor, estimate.error * factor)


def loss_command(run: TrainedRun, output: Path, options: LossOptions, samples: int | None = None) -> dict[str, Any]:
    """Evaluate a run's checkpoint as `options` ask, write the report to `output` and return the result.

    samples: as in `TrainedRun.sample_count`. Raises UserError for whatever cannot be answered, before anything is
    written.
    """
    check_output(output)
    options.check()
    with alone():
        analysis = LossAnalysis(run, options, run.sample_count(samples))
        passes = sum(job.samples * job.parts for job in analysis.jobs)
        with progress(passes, "sequence") as bar:
            result = analysis.answer(lambda: bar.update())
    write_report(output, "loss", result, markdown(result), figures(result))
    return result


def markdown(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    checkpoint = result["checkpoint"]
    tables = [
        _patterns_table(result),
        _far_recall_table(result),
        _classes_table(result),
        _sweep_table(result),
        _positions_table(result),
    ]
    return "\n".join(
        [
            f"# Loss of {result['run']} under other patterns\n",
            f"Step {checkpoint['step']:,} ({checkpoint['tokens']:,} tokens), {result['samples']:,} samples of "
            f"{result['sequence_length']:,} tokens. {READING}\n",
            *(table.markdown() for table in tables if table is not None),
            *(f"{sentence}\n" for sentence in _sentences(result)),
        ]
    )


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Pictures of the parts that there are, by file name."""
    found = {"loss_by_position": _position_figure(result)}
    classes = result["classes"]
    if classes:
        names = [row["class"] for row in classes]
        found["loss_without_class"] = plots.bars(
            "Loss without a class of separators",
            names,
            {"change": [row["change"].mean for row in classes]},
            "change in loss (nats per token)",
            {"change": [row["change"].error for row in classes]},
        )
        rows = [row for row in classes if row["per_thousand_pairs"] is not None]
        found["loss_per_removed_pair"] = plots.bars(
            "Change in loss for each thousand pairs removed",
            [row["class"] for row in rows],
            {"change": [row["per_thousand_pairs"].mean for row in rows]},
            "nats per thousand (query, key) pairs",
            {"change": [row["per_thousand_pairs"].error for row in rows]},
        )
    if result["sweep"]:
        found["loss_vs_pairs"] = _sweep_figure(result["sweep"])
    if result["far_recall"]:
        found["far_recall"] = _far_figure(result["far_recall"])
    return found


def _patterns_table(result: dict[str, Any]) -> Table:
    rows = [
        [row["pattern"], shown(row["loss"]), signed(row["change"]), f"{row['attended_share']:.1%}"]
        for row in result["patterns"]
    ]
    return Table("Patterns", ["pattern", "loss", "change", "attended"], rows)


def _far_recall_table(result: dict[str, Any]) -> Table | None:
    rows = [
        [f"{row['pattern']}: {row['tokens']}", f"{row['share']:.1%}", shown(row["loss"]), signed(row["change"])]
        for row in result["far_recall"]
    ]
    title = f"Far-recall tokens (last occurrence of the bigram more than {result['window']} tokens back)"
    return Table(title, ["pattern and tokens", "share of tokens", "loss", "change"], rows) if rows else None


def _classes_table(result: dict[str, Any]) -> Table | None:
    rows = [
        [
            row["class"],
            signed(row["change"]),
            f"{row['attended_share_lost']:.2%}",
            f"{row['removed_pairs_per_token']:.2f}",
            "-" if row["per_thousand_pairs"] is None else signed(row["per_thousand_pairs"]),
            *([signed(row["far_recall_change"])] if "far_recall_change" in row else []),
        ]
        for row in result["classes"]
    ]
    header = ["class", "change in loss", "attended share lost", "pairs removed per token", "change per 1,000 pairs"]
    header += ["change, far recall"] if result["far_recall"] else []
    return Table("One class of separators dropped from the base pattern", header, rows) if rows else None


def _sweep_table(result: dict[str, Any]) -> Table | None:
    rows = []
    for row in result["sweep"]:
        line = [
            f"S={row['length']:,} n={row['window']}",
            f"{row['pairs_per_token']:,.0f}",
            f"{row['attended_share']:.1%}",
        ]
        line += [shown(row["loss"]), signed(row["change"])]
        equal = "equal_loss" in row
        line += (
            [str(row["equal_window"]), shown(row["equal_loss"]), signed(row["separators_gain"])] if equal else ["-"] * 3
        )
        far = "far_recall_separators_gain" in row
        line += [signed(row["far_recall_separators_gain"]) if far else "-"] if result["far_recall"] else []
        rows.append(line)
    header = ["length, window", "pairs/token", "attended", "loss", "change from trained"]
    header += ["n without separators", "loss without", "without - with"]
    header += ["without - with, far recall"] if result["far_recall"] else []
    title = "Windows and lengths, with separators and without them at equal attended pairs"
    return Table(title, header, rows) if rows else None


def _positions_table(result: dict[str, Any]) -> Table:
    rows = [
        [f"{row['first']:,}-{row['last']:,}", shown(row["trained"])]
        + ([shown(row["base"])] if result["trained_differs"] else [])
        for row in result["positions"]
    ]
    header = ["position", "as trained", *(["base"] if result["trained_differs"] else [])]
    return Table("Loss by position in the sequence", header, rows)


def _sentences(result: dict[str, Any]) -> list[str]:
    """Conclusions from the numbers, and what they leave open."""
    sentences = []
    single = [row for row in result["classes"] if row["class"] != "all of them"]
    if single:
        clear = [row for row in single if clear_of_zero(row["change"])]
        groups = {
            "Without this class the loss is higher by more than two standard errors": [
                row for row in clear if row["change"].mean > 0
            ],
            "Lower by more than two": [row for row in clear if row["change"].mean < 0],
            "Within two standard errors of no change": [row for row in single if row not in clear],
        }
        sentences += [f"{words}: {', '.join(row['class'] for row in rows)}." for words, rows in groups.items() if rows]
    gains = [row for row in result["sweep"] if "separators_gain" in row]
    if gains:
        better = [row for row in gains if row["separators_gain"].mean > 0 and clear_of_zero(row["separators_gain"])]
        worse = [row for row in gains if row["separators_gain"].mean < 0 and clear_of_zero(row["separators_gain"])]
        sentences.append(
            f"At equal attended pairs separators beat neighbours by more than two standard errors in {len(better)} of "
            f"{len(gains)} settings, and lose by more than two in {len(worse)}; no correction is made for their number."
        )
    lengths = [row["length"] for row in result["sweep"]]
    if lengths and max(lengths) > result["sequence_length"]:
        sentences.append(
            f"The model was trained on sequences of {result['sequence_length']:,} tokens: at longer ones its positions "
            "are new to it, which raises the loss whatever the pattern."
        )
    return sentences


def _position_figure(result: dict[str, Any]) -> Figure:
    rows = result["positions"]
    x = [(row["first"] + row["last"] + 1) / 2 for row in rows]
    names = {"trained": "as trained", **({"base": "base"} if result["trained_differs"] else {})}
    curves = [
        (label, x, [row[key].mean for row in rows], {"error": [row[key].error for row in rows]})
        for key, label in names.items()
    ]
    return plots.lines(
        "Loss by position in the sequence", curves, "position (middle of a bucket)", "loss (nats per token)", log_x=True
    )


def _sweep_figure(sweep: Sequence[dict[str, Any]]) -> Figure:
    curves: list[plots.Curve] = []
    for number, length in enumerate(dict.fromkeys(row["length"] for row in sweep)):
        rows = [row for row in sweep if row["length"] == length]
        bare = [row for row in rows if "equal_loss" in row]
        x, y = [row["pairs_per_token"] for row in rows], [row["loss"].mean for row in rows]
        curves.append((f"S={length:,}, with separators", x, y, {"colour": number}))
        if bare:
            x, y = [row["equal_keys"] for row in bare], [row["equal_loss"].mean for row in bare]
            curves.append((f"S={length:,}, without", x, y, {"colour": number, "dashed": True}))
    return plots.lines(
        "Loss at equal attended pairs", curves, "pairs per token, all layers", "loss (nats per token)", log_x=True
    )


def _far_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    groups = list(dict.fromkeys(row["tokens"] for row in rows))
    table = {(row["pattern"], row["tokens"]): row["loss"] for row in rows}
    return plots.bars(
        "Loss of far-recall tokens and of others",
        groups,
        {name: [table[name, group].mean for group in groups] for name in patterns},
        "loss (nats per token)",
        {name: [table[name, group].error for group in groups] for name in patterns},
    )

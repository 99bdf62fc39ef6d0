"""Loss of a trained model that sees some of the separators, and of evenly spaced tokens and neighbours at as many keys.

The weights are those of training throughout, as in `losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_prep.density import class_names, missing_splits
from data_prep.separators import class_numbers
from sepllm_train.analysis import ablation_report
from sepllm_train.analysis.interval import kept_keys, matching_interval, matching_window
from sepllm_train.analysis.losses import Job
from sepllm_train.analysis.report import check_output, progress, write_report
from sepllm_train.base.statistics import token_mean
from sepllm_train.config.schema import AttentionConfig, require
from sepllm_train.data.choice import settle_separators
from sepllm_train.data.placement import uniform_draws
from sepllm_train.distributed.launch import alone
from sepllm_train.model.pattern import AttentionPattern, resolve_pattern
from sepllm_train.runs.evaluate import recall_distance, usual_window
from sepllm_train.runs.held_out import held_out_samples, text_of
from sepllm_train.runs.open import TrainedRun
from sepllm_train.runs.variations import base_attention

# The paper's Table 17, and every token with a line break, merged ones too.
SUBSETS = {
    "nine": ("paper",),
    "four": ("comma", "period", "question", "semicolon"),
    "two": ("period", "question"),
    "line breaks": ("newline", "line_merged", "line_mixed", "paragraph_merged", "paragraph_mixed"),
}
# Class that stands for a token drawn at random.
DRAWN = "period"


@dataclass(frozen=True)
class AblationOptions:
    """n and initial tokens of every pattern but the model's own and dense (None: those of the base pattern), and the
    subsets of separators, each CLASSES or NAME=CLASSES with classes between commas (none: SUBSETS and each class)."""

    window: int | None = None
    initial: int | None = None
    subsets: Sequence[str] = ()

    def check(self) -> None:
        """Raise UserError for a window or a number of initial tokens that is none, and for subsets that are none."""
        require(
            self.window is None or self.window >= 1,
            f"--window {self.window}: a window counts the token itself, so it is at least 1.",
        )
        require(self.initial is None or self.initial >= 0, f"--initial {self.initial} must be 0 or more.")
        self.named()

    def named(self) -> dict[str, tuple[str, ...]]:
        """Names of the subsets that were asked for, each with its class names. Raises UserError."""
        found: dict[str, tuple[str, ...]] = {}
        for text in self.subsets:
            name, equals, classes = text.partition("=")
            require(name not in found, f"--subsets {text}: there are two subsets called {name}; write NAME=CLASSES.")
            found[name] = tuple(part.strip() for part in (classes if equals else name).split(","))
            class_numbers(found[name])
        return found


class RandomTokens(Dataset):
    """Samples of `dataset` in which each token is special with probability `density`, whatever the text.

    What is drawn depends on the seed, the number of the sample and the position alone, so that it tells nothing of
    later tokens. Special tokens have the class DRAWN, the others none.
    """

    def __init__(self, dataset: Any, density: float, seed: int) -> None:
        self.dataset = dataset
        self.density = density
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        sample = self.dataset[number]
        (special,) = class_numbers(DRAWN)
        drawn = uniform_draws(len(sample["tokens"]), self.seed, f"random {number}") < self.density
        return {**sample, "separator_class": torch.from_numpy(drawn.astype(np.uint8) * special)}


@dataclass(eq=False)
class Row:
    """A pattern and its evaluation.

    `series` is reference, subset, fixed, streaming or random; `matches` are the subsets whose kept keys an interval or
    a window has; `density` is the share of the tokens that are separators, or are expected to be drawn.
    """

    name: str
    series: str
    attention: AttentionConfig
    job: Job
    density: float | None = None
    matches: list[str] = field(default_factory=list)


class Ablation:
    """The rows for a run on `samples` samples, and the answers once their jobs have run."""

    def __init__(self, run: TrainedRun, options: AblationOptions, samples: int) -> None:
        self.run = run
        self.model = run.model
        self.samples = samples
        trained = run.config.attention
        base = base_attention(trained, [])
        self.base = replace(
            base,
            pattern="sep",
            separators="paper",
            interval=None,
            placement="natural",
            keep_share=None,
            window=base.window if options.window is None else options.window,
            initial_tokens=base.initial_tokens if options.initial is None else options.initial,
        )
        self.dataset = run.validation
        if trained.placement != "natural":
            self.dataset = held_out_samples(replace(run.config, attention=self.base), run.corpus)
        self.text = text_of(self.dataset, samples)
        self.window = usual_window(resolve_pattern(self.base, run.config.model.layers))
        self._jobs: dict[tuple[Any, ...], Job] = {}
        self.trained = self._job(run.pattern, run.validation)
        self.rows: dict[tuple[str, Any], Row] = {}
        self.matched: list[tuple[Row, Row, Row]] = []
        self._plan(options)

    @property
    def jobs(self) -> list[Job]:
        """Every evaluation, once."""
        return list(self._jobs.values())

    def _plan(self, options: AblationOptions) -> None:
        """The rows: the model's own pattern, dense, without separators, each subset, and what keeps as many keys."""
        trained, base, layers = self.run.config.attention, self.base, self.run.config.model.layers
        if trained.pattern != "dense":
            self.rows["reference", "trained"] = Row("as trained", "reference", trained, self.trained)
        self._row("reference", "dense", replace(base, pattern="dense"))
        self._row("streaming", f"none, n = {base.window}", replace(base, pattern="streaming"))
        subsets = []
        for name, classes in self._subsets(options).items():
            attention, density = replace(base, separators=list(classes)), self._density(classes)
            subsets.append(self._row("subset", name, attention, density=density))
            if name == "nine":
                drawn = RandomTokens(self.dataset, density, self.run.config.seed)
                self._row("random", "random, as many as nine", replace(base, separators=[DRAWN]), drawn, density)
        for subset in subsets:
            fixed = matching_interval(subset.attention, layers, self.text)
            wide = matching_window(subset.attention, layers, self.text)
            equal = (
                self._row("fixed", f"every D-th, D = {fixed.value}", fixed.attention),
                self._row("streaming", f"none, n = {wide.value}", wide.attention),
            )
            for row in equal:
                row.matches.append(subset.name)
            self.matched.append((subset, *equal))

    def _subsets(self, options: AblationOptions) -> dict[str, tuple[str, ...]]:
        """Names of the subsets that occur in the samples, each with its class names.

        Raises UserError when one that was asked for does not, or tells classes apart that the data does not.
        """
        asked = options.named()
        for name, classes in asked.items():
            settle_separators(
                replace(self.run.config, attention=replace(self.base, separators=list(classes))), self.run.corpus
            )
            require(self._density(classes) > 0, f"--subsets {name}: these samples have no such token.")
        if asked:
            return asked
        present = torch.bincount(self.text["separator_class"].flatten().long(), minlength=256)
        split = missing_splits([source.header for source in self.run.corpus.sources])
        single = class_names([number for number in range(1, 256) if present[number]], split)
        require(
            bool(single), "these samples have no separators, so there is nothing to leave out: take others with --data."
        )
        several = {name: classes for name, classes in SUBSETS.items() if self._density(classes) > 0}
        alone = {name: (name,) for name in single}
        # With no merged line breaks in the samples, line breaks and newlines are the same tokens.
        found = {
            name: self._numbers(classes) & set(present.nonzero().flatten().tolist())
            for name, classes in several.items()
        }
        return several | {name: own for name, own in alone.items() if self._numbers(own) not in found.values()}

    @staticmethod
    def _numbers(classes: Sequence[str]) -> set[int]:
        return set(class_numbers(classes))

    def _density(self, classes: Sequence[str]) -> float:
        """Share of the samples' tokens that are of these classes."""
        member = torch.zeros(256, dtype=torch.bool)
        member[list(class_numbers(classes))] = True
        return float(member[self.text["separator_class"].long()].double().mean())

    def _job(self, pattern: AttentionPattern, dataset: Any) -> Job:
        """The evaluation of a pattern on a dataset, one for all rows that ask for it."""
        same = (pattern.layers, pattern.tier_of_class.tobytes(), pattern.interval, pattern.initial_tokens, id(dataset))
        return self._jobs.setdefault(same, Job(pattern, dataset, self.samples))

    def _row(
        self, series: str, name: str, attention: AttentionConfig, dataset: Any = None, density: float | None = None
    ) -> Row:
        """The row of a series with this name, which is made once."""
        job = self._job(
            resolve_pattern(attention, self.run.config.model.layers), self.dataset if dataset is None else dataset
        )
        return self.rows.setdefault((series, name), Row(name, series, attention, job, density))

    def answer(self, advance: Callable[[], object]) -> dict[str, Any]:
        """Run every job and give the answers; `advance` is called after each forward pass."""
        for job in self.jobs:
            job.run(self.model, advance)
        far = recall_distance(self.text["tokens"], self.text["labels"]) > self.window
        masks: dict[str, Tensor | None] = {"": None} | ({"far_recall_": far} if far.any() else {})
        figures = {row: self._figures(row, masks) for row in self.rows.values()}
        random = self.rows.get(("random", "random, as many as nine"))
        equal = []
        for subset, fixed, wide in self.matched:
            found = {"subset": subset.name, "kv_kept": figures[subset]["kv_kept"]}
            found |= {"interval": fixed.attention.interval, "interval_kv_kept": figures[fixed]["kv_kept"]}
            found |= {"window": wide.attention.window, "window_kv_kept": figures[wide]["kv_kept"]}
            found |= _gains("interval_", fixed, subset, masks) | _gains("window_", wide, subset, masks)
            if random is not None and subset.name == "nine":
                found |= _gains("random_", random, subset, masks)
            equal.append(found)
        return {
            **self.run.describe(self.samples),
            "window": self.base.window,
            "recall_window": self.window,
            "initial_tokens": self.base.initial_tokens,
            "far_recall_share": float(far.double().mean()),
            "rows": list(figures.values()),
            "equal": equal,
        }

    def _figures(self, row: Row, masks: dict[str, Tensor | None]) -> dict[str, Any]:
        """What a row sees, and its losses."""
        kept = kept_keys(row.job.pattern, text_of(row.job.dataset, self.samples))
        shown = ("pattern", "separators", "placement", "window", "initial_tokens", "interval", "full_layers")
        result: dict[str, Any] = {
            "name": row.name,
            "series": row.series,
            "matches": row.matches,
            "attention": {key: getattr(row.attention, key) for key in shown},
            "density": row.density,
            "kv_kept": kept.last,
            "kv_kept_mean": kept.mean,
            "attended_share": kept.attended,
        }
        nats = row.job.result.nats
        for name, mask in masks.items():
            result[f"{name}loss"] = token_mean(nats, mask)
            result[f"{name}change"] = token_mean(nats - self.trained.result.nats, mask)
        return result


def _gains(prefix: str, other: Row, subset: Row, masks: dict[str, Tensor | None]) -> dict[str, Any]:
    """How much lower the loss is with the subset than with `other`, of all tokens and of far-recall ones."""
    difference = other.job.result.nats - subset.job.result.nats
    return {f"{prefix}{name}gain": token_mean(difference, mask) for name, mask in masks.items()}


def ablation_command(
    run: TrainedRun, output: Path, options: AblationOptions, samples: int | None = None
) -> dict[str, Any]:
    """Try separator subsets on a run's checkpoint, write the report to `output` and return the result.

    samples: as in `TrainedRun.sample_count`. Raises UserError for whatever cannot be answered, before anything is
    written.
    """
    check_output(output)
    options.check()
    with alone():
        ablation = Ablation(run, options, run.sample_count(samples))
        with progress(sum(job.samples for job in ablation.jobs), "sequence") as bar:
            result = ablation.answer(lambda: bar.update())
    write_report(output, "ablation", result, ablation_report.markdown(result), ablation_report.figures(result))
    return result

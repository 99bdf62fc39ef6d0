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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset

from data_prep.density import class_names, missing_splits
from data_prep.separators import class_numbers
from sepllm_train.analysis.losses import Evaluation
from sepllm_train.analysis.match import kept_keys, matching_interval, matching_window
from sepllm_train.analysis.output import READING, check_output, clear_of_zero, progress, shown, signed, write_report
from sepllm_train.base.figures import COLOURS, INK, MARKERS, dressed, legend_below, picture
from sepllm_train.compare.tables import Table
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
SERIES = {
    "subset": "separators",
    "fixed": "every D-th token",
    "streaming": "neighbours alone",
    "random": "tokens at random",
}


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

    What is drawn depends on the seed, the number of the sample and the position alone, so that it reveals nothing of
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
class Trial:
    """A pattern and its evaluation.

    `series` is reference, subset, fixed, streaming or random; `matches` are the subsets whose kept keys an interval or
    a window has; `density` is the share of the tokens that are separators, or are expected to be drawn.
    """

    name: str
    series: str
    attention: AttentionConfig
    job: Evaluation
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
        self._jobs: dict[tuple[Any, ...], Evaluation] = {}
        self.trained = self._job(run.pattern, run.validation)
        self.rows: dict[tuple[str, Any], Trial] = {}
        self.matched: list[tuple[Trial, Trial, Trial]] = []
        self._plan(options)

    @property
    def jobs(self) -> list[Evaluation]:
        """Every evaluation, once."""
        return list(self._jobs.values())

    def _plan(self, options: AblationOptions) -> None:
        """The rows: the model's own pattern, dense, without separators, each subset, and what keeps as many keys."""
        trained, base, layers = self.run.config.attention, self.base, self.run.config.model.layers
        if trained.pattern != "dense":
            self.rows["reference", "trained"] = Trial("as trained", "reference", trained, self.trained)
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

        Raises UserError when one that was asked for does not, or separates classes that the data does not.
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

    def _job(self, pattern: AttentionPattern, dataset: Any) -> Evaluation:
        """The evaluation of a pattern on a dataset, one for all rows that ask for it."""
        same = (pattern.layers, pattern.tier_of_class.tobytes(), pattern.interval, pattern.initial_tokens, id(dataset))
        return self._jobs.setdefault(same, Evaluation(pattern, dataset, self.samples))

    def _row(
        self, series: str, name: str, attention: AttentionConfig, dataset: Any = None, density: float | None = None
    ) -> Trial:
        """The row of a series with this name, which is made once."""
        job = self._job(
            resolve_pattern(attention, self.run.config.model.layers), self.dataset if dataset is None else dataset
        )
        return self.rows.setdefault((series, name), Trial(name, series, attention, job, density))

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

    def _figures(self, row: Trial, masks: dict[str, Tensor | None]) -> dict[str, Any]:
        """Keys that a trial sees, and its losses."""
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
        losses = row.job.result
        for name, mask in masks.items():
            result[f"{name}loss"] = losses.mean(mask)
            result[f"{name}change"] = losses.change(self.trained.result, mask)
        return result


def _gains(prefix: str, other: Trial, subset: Trial, masks: dict[str, Tensor | None]) -> dict[str, Any]:
    """Loss with `other` minus loss with the subset, of all tokens and of far-recall ones."""
    losses, reference = other.job.result, subset.job.result
    return {f"{prefix}{name}gain": losses.change(reference, mask) for name, mask in masks.items()}


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
    write_report(output, "ablation", result, markdown(result), figures(result))
    return result


def markdown(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    checkpoint = result["checkpoint"]
    return "\n".join(
        [
            f"# {result['run']} with some of the separators\n",
            f"Step {checkpoint['step']:,} ({checkpoint['tokens']:,} tokens), {result['samples']:,} samples of "
            f"{result['sequence_length']:,} tokens; n = {result['window']} where no other is named, "
            f"{result['initial_tokens']} initial tokens. Changes are from the model's own pattern. Far recall: tokens "
            f"whose bigram occurred last more than {result['recall_window']} tokens back "
            f"({result['far_recall_share']:.1%} of all). {READING}\n",
            *(table.markdown() for table in (*_tables(result), _equal_table(result))),
            *(f"{sentence}\n" for sentence in _sentences(result)),
        ]
    )


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Change in loss against the keys kept: of all tokens, and of far-recall ones where there are some."""
    found = {"ablation": _change_figure(result, "change", "Loss against keys kept")}
    if _far(result):
        found["ablation_far_recall"] = _change_figure(
            result, "far_recall_change", "Loss of far-recall tokens against keys kept"
        )
    return found


def _far(result: dict[str, Any]) -> bool:
    return result["far_recall_share"] > 0


def _tables(result: dict[str, Any]) -> list[Table]:
    """Keys kept and losses: one table for patterns with separators and two for those at equal KV kept."""
    groups: dict[str, list[dict[str, Any]]] = {"Patterns": [], "Evenly spaced tokens": [], "Neighbours alone": []}
    for row in result["rows"]:
        alone = "Neighbours alone" if row["matches"] else "Patterns"
        groups[{"fixed": "Evenly spaced tokens", "streaming": alone}.get(row["series"], "Patterns")].append(row)
    header = ["pattern", "density", "KV kept", "KV kept, all tokens", "attended", "loss", "change"]
    header += ["loss, far recall", "change, far recall"] if _far(result) else []
    return [Table(title, header, [_cells(row, result) for row in rows]) for title, rows in groups.items() if rows]


def _cells(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    shares = [f"{row[key]:.2%}" for key in ("kv_kept", "kv_kept_mean", "attended_share")]
    far = [shown(row["far_recall_loss"]), signed(row["far_recall_change"])] if _far(result) else []
    density = "-" if row["density"] is None else f"{row['density']:.2%}"
    return [row["name"], density, *shares, shown(row["loss"]), signed(row["change"]), *far]


def _equal_table(result: dict[str, Any]) -> Table:
    rows = []
    for row in result["equal"]:
        line = [row["subset"], f"{row['kv_kept']:.2%}"]
        for key in ("interval", "window"):
            line += [f"{row[key]}", f"{row[f'{key}_kv_kept']:.2%}", signed(row[f"{key}_gain"])]
            line += [signed(row[f"{key}_far_recall_gain"])] if _far(result) else []
        rows.append(line)
    header = ["separators", "KV kept"]
    for name in ("D", "n"):
        header += [name, f"KV kept, {name}", f"loss with {name} - with separators"]
        header += ["the same, far recall"] if _far(result) else []
    return Table("Evenly spaced tokens and neighbours alone at the KV kept of each subset", header, rows)


def _sentences(result: dict[str, Any]) -> list[str]:
    """Conclusions from the numbers, and how they were counted."""
    sentences = [
        "KV kept is the share of the keys so far that the last token of a sequence sees, the mean over layers and "
        "samples; over all tokens it is the mean of each token's own share. Attended are the pairs over those of the "
        "causal triangle. D and n are those whose KV kept at the last token is nearest on these samples."
    ]
    for key, words in (("interval", "evenly spaced tokens"), ("window", "neighbours alone")):
        gains = [row[f"{key}_gain"] for row in result["equal"]]
        clear = [gain.mean for gain in gains if clear_of_zero(gain)]
        sentences.append(
            f"Separators beat {words} by more than two standard errors in {sum(mean > 0 for mean in clear)} of "
            f"{len(gains)} subsets, and lose by more than two in {sum(mean < 0 for mean in clear)}; no correction is "
            "made for their number."
        )
    random = next((row for row in result["rows"] if row["series"] == "random"), None)
    if random is not None:
        nine = next(row for row in result["equal"] if row["subset"] == "nine")
        far = f"; of far-recall tokens {signed(nine['random_far_recall_gain'])}" if _far(result) else ""
        sentences.append(
            f"Tokens at random: each is special with probability {random['density']:.4f}, the density of the nine, "
            "drawn by the seed of the run, the number of the sample and the position, so that nothing of the text "
            f"decides. Loss with them - with the nine: {signed(nine['random_gain'])}{far}."
        )
    return sentences


def _change_figure(result: dict[str, Any], key: str, title: str) -> Figure:
    def draw(figure: Figure) -> None:
        plot = dressed(
            figure.add_subplot(), title, "KV kept at the last token (percent)", "change in loss (nats per token)"
        )
        for number, (series, label) in enumerate(SERIES.items()):
            rows = sorted((row for row in result["rows"] if row["series"] == series), key=lambda row: row["kv_kept"])
            if not rows:
                continue
            plot.errorbar(
                [100 * row["kv_kept"] for row in rows],
                [row[key].mean for row in rows],
                yerr=[row[key].error for row in rows],
                color=COLOURS[number],
                # Subsets are no points of one curve.
                linestyle="-" if series in ("fixed", "streaming") else "none",
                linewidth=1.2,
                elinewidth=0.8,
                marker=MARKERS[number],
                markersize=5,
                label=label,
            )
        plot.axhline(0, color=INK, linewidth=0.8)
        _name_subsets(plot, [row for row in result["rows"] if row["series"] == "subset"], key)
        legend_below(figure)

    return picture((7.6, 5.2), draw)


def _name_subsets(plot: Axes, rows: list[dict[str, Any]], key: str) -> None:
    """Write the names of subsets beside their points, but for those that would lie on an earlier one's."""
    (left, right), (low, high) = plot.get_xlim(), plot.get_ylim()
    named: list[tuple[float, float]] = []
    for row in rows:
        x, y = 100 * row["kv_kept"], row[key].mean
        if all(abs(x - a) > 0.13 * (right - left) or abs(y - b) > 0.035 * (high - low) for a, b in named):
            plot.annotate(row["name"], (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8, color=INK)
            named.append((x, y))

"""The questions to trained runs of several seeds, their answers by seed, and the verdict."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from data_prep.readers import Corpus
from data_prep.tokenizers import Tokenizer
from sepllm_train.analysis import plots
from sepllm_train.analysis.output import check_output, progress, write_report
from sepllm_train.analysis.probe.facts import VALUES, FactVocabulary, sentences, vocabulary_of
from sepllm_train.analysis.probe.interventions import (
    BESIDE,
    CONDITIONS,
    DECIDING,
    MASKED,
    REFUTES,
    REPLACED,
    SEEDS,
    SUPPORTS,
    Text,
    intervene,
)
from sepllm_train.analysis.probe.recall import Needle, NeedleAnswer, ask_needle, fact_tokens, mentions, needles, rank
from sepllm_train.base.statistics import Estimate, estimate, token_mean
from sepllm_train.compare.tables import Table
from sepllm_train.config.schema import require
from sepllm_train.distributed.launch import alone
from sepllm_train.runs.evaluate import attending, recall_distance, stacked_reach
from sepllm_train.runs.held_out import text_of
from sepllm_train.runs.open import TrainedRun
from sepllm_train.runs.records import refuse_twins
from sepllm_train.runs.variations import classes_of, without_classes

FAR = "far recall"
VALUES_TOLD = "far recall, values of facts"
KEYS_TOLD = "far recall, keys of facts"
REAL = "far recall, real text"
GROUPS = ("all", FAR, VALUES_TOLD, KEYS_TOLD, REAL)
# Sentences of real text that needles are hidden in.
_SENTENCES = 2000
# Tokens of the longest of them.
_LONGEST = 60
FIRST = f"right value first of {VALUES}"
READING = (
    "Only what queries at the window's distance or more read of separators is changed; neighbours, keys, initial "
    "tokens and the learned sink stay. share = (loss with values replaced - loss) / (loss with far separators masked - "
    f"loss), per seed; `{DECIDING}` decides: values of separators of the same class in another held-out text. Over 0.5 "
    "supports summary, under 0.2 refutes it; three seeds. The first separator of a class has no earlier segment and "
    "keeps its own value in `another segment`. Far-recall tokens repeat a bigram whose last occurrence is further back "
    "than all windows together reach. Intervals are Student's t over seeds; ± is one standard error over samples."
)


@dataclass(frozen=True)
class ProbeOptions:
    """Sizes of the probe: held-out samples for the interventions; `needles` for each distance, hidden in the `text`
    files (.txt or .jsonl that no run was trained on; without any, no needles)."""

    samples: int = 128
    needles: int = 32
    text: Sequence[Path] = ()
    seed: int = 0


def ask(runs: Sequence[TrainedRun], output: Path, options: ProbeOptions) -> dict[str, Any]:
    """Ask runs that differ in their seed, write probe.json, probe.md and pictures to `output` and return the result.

    Raises UserError, before anything is written, for runs without separators beyond the window, with full layers, or
    with different patterns, and as the properties of `TrainedRun` do.
    """
    check_output(output)
    require(options.samples >= 2, f"--samples {options.samples} must be at least 2: one is the other's donor.")
    _check_seeds(runs)
    with alone():
        # Copies, each dropped with its model: one at a time is in memory.
        results = [_ask_run(replace(run), options) for run in runs]
    result = {
        "runs": results,
        **results[0]["model"],
        "groups": _together(results),
        "verdict": verdict(results),
    }
    write_report(output, "probe", result, markdown(result), figures(result))
    return result


def _check_seeds(runs: Sequence[TrainedRun]) -> None:
    """Raise UserError unless the runs differ in their seed, and in nothing that they are asked about."""
    refuse_twins([run.folder for run in runs])
    configs = [run.config for run in runs]
    first = configs[0]
    for run, config in zip(runs[1:], configs[1:], strict=True):
        for key, own, wanted in (
            ("model", config.model, first.model),
            ("attention", replace(config.attention, backend="auto"), replace(first.attention, backend="auto")),
            ("data.prefixes", config.data.prefixes, first.data.prefixes),
            ("data.validation_prefixes", config.data.validation_prefixes, first.data.validation_prefixes),
            ("data.sequence_length", config.data.sequence_length, first.data.sequence_length),
            ("data.mask_boundary_loss", config.data.mask_boundary_loss, first.data.mask_boundary_loss),
            ("training.steps", config.training.steps, first.training.steps),
        ):
            require(
                own == wanted,
                f"{run.folder} has another {key} than {runs[0].folder}: give runs that differ in their seed.",
            )
    require(
        len({config.seed for config in configs}) == len(configs),
        "two of the runs have the same seed: give one run for each.",
    )


def _ask_run(run: TrainedRun, options: ProbeOptions) -> dict[str, Any]:
    """Every answer of one run."""
    layers = run.pattern.layers
    require(
        bool(classes_of(run.pattern)) and not any(layer.full for layer in layers) and len(set(layers)) == 1,
        f"{run.folder}: the probe needs separators beyond the window and no full layer, with one window for all "
        "layers.",
    )
    window, length = layers[0].window, run.config.data.sequence_length
    reach = stacked_reach(window, len(layers))
    require(
        2 * reach < length,
        f"{run.folder}: {len(layers)} windows of {window} reach {reach} tokens, more than half of its {length}: too "
        "few tokens can be recalled from beyond.",
    )
    tokenizer, classes = run.tokenizer, run.classes
    vocabulary = vocabulary_of(tokenizer)
    samples = run.sample_count(options.samples)
    hidden = _hidden(options, tokenizer, vocabulary, reach, length, run.pattern.initial_tokens)
    text = text_of(run.validation, samples)
    masked, model = without_classes(run.pattern, classes_of(run.pattern)), run.model

    def without(asked: Text) -> Tensor:
        with attending(model, masked):
            return asked.forward(model, masked, loss=False)

    with progress(3 * samples + len(hidden), "sequence") as bar:
        losses = intervene(run, samples, options.seed, lambda: bar.update())
        recalled = _associative(run, samples, vocabulary, reach, without, lambda: bar.update())
        answers = []
        for needle in hidden:
            answers.append(ask_needle(run, needle, classes, vocabulary, without))
            bar.update()
    embeddings = model.vocab_size * run.config.model.hidden * (1 if run.config.model.tied_embeddings else 2)
    return {
        **run.describe(samples),
        "seed": run.config.seed,
        "model": {
            "parameters_without_embeddings": sum(p.numel() for p in model.parameters()) - embeddings,
            "layers": len(layers),
            "window": window,
            "length": length,
            "reach": reach,
            "sink": run.config.attention.sink,
        },
        "groups": _groups(losses, text, vocabulary, reach),
        "associative": recalled,
        "needles": [_needle_row(distance, answers) for distance in dict.fromkeys(a.needle.asked for a in answers)],
    }


def _hidden(
    options: ProbeOptions, tokenizer: Tokenizer, vocabulary: FactVocabulary, reach: int, length: int, initial: int
) -> list[Needle]:
    """Needles at distances from just beyond the stacked windows to the whole length."""
    if not options.text:
        return []
    texts = sentences(document.text for document in Corpus(options.text))
    filling = [ids for ids in tokenizer.encode_batch(list(islice(texts, _SENTENCES))) if len(ids) <= _LONGEST]
    require(bool(filling), f"{', '.join(map(str, options.text))}: there is no sentence to hide a needle in.")
    # A tail ends with a whole sentence, so it may be longer than asked for; the fact comes after the initial tokens.
    farthest = length - _LONGEST - 2 - initial
    require(
        farthest > reach,
        f"--text: no needle fits between the {reach} tokens that the windows reach and the {length} of a sequence.",
    )
    distances = sorted({round(reach + 1 + (farthest - reach) * part / 3) for part in range(4)})
    return list(needles(filling, vocabulary, distances, options.needles, length, options.seed))


def _needle_row(distance: int, answers: Sequence[NeedleAnswer]) -> dict[str, Any]:
    """Shares over the needles of a distance."""
    own = [answer for answer in answers if answer.needle.asked == distance]
    return {
        "distance": fmean(answer.needle.distance for answer in own),
        "needles": len(own),
        "first": fmean(answer.rank == 0 for answer in own),
        "first_masked": fmean(answer.masked == 0 for answer in own),
        "rank": fmean(answer.rank for answer in own),
        "prefers_twin": fmean(answer.prefers for answer in own),
        "follows_twin": fmean(answer.follows for answer in own),
    }


@torch.no_grad()
def _associative(
    run: TrainedRun,
    samples: int,
    vocabulary: FactVocabulary,
    reach: int,
    without: Callable[[Text], Tensor],
    advance: Callable[[], object],
) -> list[dict[str, Any]]:
    """Recall of facts in held-out text by distance, in ranges that double from the reach of the stacked windows."""
    device = next(run.model.parameters()).device
    ranks: dict[str, list[tuple[int, int, int]]] = {}
    edges = [0, reach]
    while edges[-1] <= run.config.data.sequence_length:
        edges.append(2 * edges[-1])
    for number in range(samples):
        sample = run.validation[number]
        found = list(mentions(sample["tokens"][None], sample["labels"][None], vocabulary))
        if found:
            text = Text.of(sample, device)
            own, masked = text.forward(run.model, run.pattern, loss=False), without(text)
            for mention in found:
                place = bisect_left(edges, mention.distance)
                name = f"{edges[place - 1] + 1} to {edges[place]}"
                first, second = (rank(logits[mention.query], vocabulary, mention.value) for logits in (own, masked))
                ranks.setdefault(name, []).append((mention.distance, first, second))
        advance()
    return [
        {
            "distances": name,
            "distance": fmean(distance for distance, _, _ in rows),
            "questions": len(rows),
            "first": fmean(own == 0 for _, own, _ in rows),
            "first_masked": fmean(masked == 0 for _, _, masked in rows),
        }
        for name, rows in sorted(ranks.items(), key=lambda entry: entry[1][0][0])
    ]


def _groups(
    losses: dict[str, Tensor], text: dict[str, Tensor], vocabulary: FactVocabulary, reach: int
) -> dict[str, Any]:
    """For each group of tokens: their share, the loss, its change in each condition, and the share of each
    replacement in what masking costs."""
    far = recall_distance(text["tokens"], text["labels"]) > reach
    by_fact = torch.zeros_like(far)
    for mention in mentions(text["tokens"], text["labels"], vocabulary):
        by_fact[mention.sample, mention.query] = mention.distance > reach
    keys, facts = fact_tokens(text["tokens"], text["labels"], vocabulary)
    counted = text.get("loss_mask", torch.ones_like(far))
    masks = {
        "all": torch.ones_like(far),
        FAR: far,
        VALUES_TOLD: by_fact,
        KEYS_TOLD: far & keys,
        REAL: far & ~facts,
    }
    base = losses[CONDITIONS[0]]
    rows = {}
    for name, mask in masks.items():
        mask = mask & counted
        changes = {key: token_mean(found - base, mask) for key, found in losses.items() if found is not base}
        rows[name] = {
            "tokens": int(mask.sum()),
            "loss": token_mean(base, mask),
            "changes": changes,
            "shares": {key: shared(changes[key], changes[MASKED]) for key in REPLACED},
        }
    return rows


def shared(replaced: Estimate, masked: Estimate) -> float | None:
    """The part of masking's cost that replacing causes; None where masking costs no more than twice its error."""
    return replaced.mean / masked.mean if masked.mean > 2 * masked.error else None


def _together(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares and changes of each group, over the seeds, with intervals."""
    rows: dict[str, Any] = {}
    for name in GROUPS:
        own = [result["groups"][name] for result in results]
        rows[name] = {
            "loss": asdict(estimate([row["loss"].mean for row in own])),
            "changes": {
                key: asdict(estimate([row["changes"][key].mean for row in own])) for key in (MASKED, *REPLACED)
            },
            "shares": {key: _share_over_seeds([row["shares"][key] for row in own]) for key in REPLACED},
        }
    return rows


def _share_over_seeds(shares: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean share with its interval; None when a seed has none."""
    known = [share for share in shares if share is not None]
    return asdict(estimate(known)) if len(known) == len(shares) else None


def verdict(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rule of `interventions.py`: by the mean share over seeds, on far-recall tokens beyond the stacked windows.

    `answer` is by DECIDING; `beside` has what the rule would say by BESIDE.
    """
    by = {
        key: _share_over_seeds([result["groups"][FAR]["shares"][key] for result in results])
        for key in (DECIDING, BESIDE)
    }
    return {
        "share": by[DECIDING],
        "answer": _answer(by[DECIDING], len(results)),
        "supports": SUPPORTS,
        "refutes": REFUTES,
        "by": DECIDING,
        "beside": {"by": BESIDE, "share": by[BESIDE], "answer": _answer(by[BESIDE], len(results))},
    }


def _answer(share: dict[str, Any] | None, seeds: int) -> str:
    """Verdict of the rule on a share, with a remark where its interval reaches past the bound."""
    if seeds < SEEDS:
        return f"none: the rule takes {SEEDS} seeds, not {seeds}"
    if share is None:
        return "none: masking far separators costs at least one of the models nothing that could be shared"
    if share["mean"] > SUPPORTS:
        return "summary" + (", though the interval reaches below the bound" if share["low"] <= SUPPORTS else "")
    if share["mean"] < REFUTES:
        refuted = "sink: summary is refuted"
        return refuted + (", though the interval reaches above the bound" if share["high"] >= REFUTES else "")
    return "undecided"


def markdown(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    runs = result["runs"]
    return "\n".join(
        [
            "# Summary or sink?\n",
            f"{headline(result['verdict'], len(runs))}\n",
            f"{len(runs)} runs of {result['parameters_without_embeddings'] / 1e6:.2f}M parameters without embeddings, "
            f"{result['layers']} layers of n = {result['window']}, sequences of {result['length']:,} tokens, sink: "
            f"{result['sink']}, no full layer. Stacked windows reach {result['reach']} tokens. {READING}\n",
            *(
                table.markdown()
                for table in (_over_seeds_table(result), _by_seed_table(result), _associative_table(result))
            ),
            *([_needles_table(result).markdown()] if runs[0]["needles"] else []),
        ]
    )


def headline(verdict: dict[str, Any], seeds: int) -> str:
    """The verdict and the shares that it and the other reading go by."""
    beside = verdict["beside"]
    own, other = ("" if one["share"] is None else f" Share {_interval(one['share'])}" for one in (verdict, beside))
    found = own and f"{own} with `{verdict['by']}` on far-recall tokens, {seeds} seed{'s' * (seeds > 1)}."
    beside_text = (
        other and f"{other} with `{beside['by']}` of the same text, which does not decide: {beside['answer']}."
    )
    return f"**{verdict['answer'].capitalize()}.**{found}{beside_text}"


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Pictures, by file name."""
    groups = [name for name in result["groups"] if name != "all"]
    changes = {key: [result["groups"][name]["changes"][key]["mean"] for name in groups] for key in (MASKED, *REPLACED)}
    found = {
        "loss_by_intervention": plots.bars(
            "What far separators are worth", groups, changes, "change in loss (nats per token), mean over seeds"
        ),
        "recall_by_distance": _recall_figure(result, "associative", "Associative recall in held-out text"),
    }
    if result["runs"][0]["needles"]:
        found["needles"] = _recall_figure(result, "needles", "One fact in real text")
    return found


def _over_seeds_table(result: dict[str, Any]) -> Table:
    rows = []
    for name, group in result["groups"].items():
        for key in (MASKED, *REPLACED):
            share = group["shares"].get(key)
            cell = "1" if key == MASKED else "-" if share is None else _interval(share)
            rows.append([name, key, f"{group['loss']['mean']:.4f}", _interval(group["changes"][key], "+"), cell])
    return Table("Over seeds", ["tokens", "far separators", "loss", "change in loss", "share"], rows)


def _by_seed_table(result: dict[str, Any]) -> Table:
    rows = []
    for run in result["runs"]:
        for name, group in run["groups"].items():
            changes = [f"{found.mean:+.4f} ± {found.error:.4f}" for found in group["changes"].values()]
            share = group["shares"][DECIDING]
            cell = "-" if share is None else f"{share:.2f}"
            rows.append([str(run["seed"]), name, f"{group['tokens']:,}", f"{group['loss'].mean:.4f}", *changes, cell])
    heads = ["seed", "tokens", "count", "loss", MASKED, *REPLACED, f"share, {DECIDING}"]
    return Table("Seed by seed, change in loss", heads, rows)


def _associative_table(result: dict[str, Any]) -> Table:
    rows = [
        [
            str(run["seed"]),
            row["distances"],
            f"{row['questions']:,}",
            f"{row['first']:.1%}",
            f"{row['first_masked']:.1%}",
        ]
        for run in result["runs"]
        for row in run["associative"]
    ]
    heads = ["seed", "tokens back", "questions", FIRST, "far separators masked"]
    return Table("Associative recall in held-out text", heads, rows)


def _needles_table(result: dict[str, Any]) -> Table:
    rows = [
        [
            str(run["seed"]),
            f"{row['distance']:.0f}",
            str(row["needles"]),
            f"{row['first']:.1%}",
            f"{row['first_masked']:.1%}",
            f"{row['prefers_twin']:.1%}",
            f"{row['follows_twin']:.1%}",
        ]
        for run in result["runs"]
        for row in run["needles"]
    ]
    heads = [
        "seed",
        "tokens back",
        "needles",
        FIRST,
        "far separators masked",
        "prefers the twin's value",
        "with the twin's values of far separators",
    ]
    return Table("Needles: one fact in real text, and its twin with another value", heads, rows)


def _recall_figure(result: dict[str, Any], key: str, title: str) -> Figure:
    """Share of right answers by distance, each seed a line, dashed with far separators masked."""
    curves: list[plots.Curve] = []
    for number, run in enumerate(result["runs"]):
        away = [row["distance"] for row in run[key]]
        curves.append((f"seed {run['seed']}", away, [row["first"] for row in run[key]], {"colour": number}))
        masked = [row["first_masked"] for row in run[key]]
        style = {"colour": number, "dashed": True}
        curves.append((f"seed {run['seed']}, far separators masked", away, masked, style))
    return plots.lines(title, curves, "tokens back", FIRST, log_x=True, level=1 / VALUES)


def _interval(estimate: dict[str, Any], sign: str = "") -> str:
    """Mean and interval of an estimate over seeds."""
    mean = f"{estimate['mean']:{sign}.3f}"
    if estimate["low"] is None:
        return mean
    return f"{mean} ({estimate['low']:{sign}.3f} to {estimate['high']:{sign}.3f})"

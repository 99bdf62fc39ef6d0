"""Share of a dense model's loss that post-training under another attention pattern recovers.

dense   the source, which is the checkpoint that the run began with, under its own pattern
before  the same weights under the run's pattern
after   the run's newest checkpoint under its pattern

All on the same held-out samples: gap = before - dense, and the recovered share is (before - after) / gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from sepllm_train.analysis import plots
from sepllm_train.analysis.output import check_output, clear_of_zero, progress, shown, signed, write_report
from sepllm_train.base.console import quantity, say
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import hash_file
from sepllm_train.base.statistics import Estimate, ratio_of_sums, token_mean
from sepllm_train.compare.tables import Table
from sepllm_train.compare.variants import ALLOWED, check_comparable
from sepllm_train.config.compatibility import (
    DATA,
    ROTARY_BASE,
    ROTARY_SCALING,
    TOKENIZER,
    VALIDATION_FRACTION,
    same_data,
)
from sepllm_train.config.schema import AttentionConfig, Config, require
from sepllm_train.data.corpus import Corpus
from sepllm_train.distributed.launch import alone
from sepllm_train.model.pattern import AttentionPattern, resolve_pattern
from sepllm_train.runs import records
from sepllm_train.runs.evaluate import evaluate
from sepllm_train.runs.held_out import held_out_samples, text_of, validated_on
from sepllm_train.runs.open import Checkpoint, TrainedRun
from sepllm_train.runs.variations import with_window
from sepllm_train.training import checkpoint as checkpoints
from sepllm_train.training.checkpoint.files import MANIFEST, altered, step_folder
from sepllm_train.training.initial_weights import find_initial_weights
from sepllm_train.training.run_folder import read_run_json

# What runs and their sources must have in common: keys of a checkpoint's identity, and how to call them.
SHARED = {
    DATA: "data",
    TOKENIZER: "tokenizers",
    VALIDATION_FRACTION: "data.validation_fraction, so other text was held out",
    "data.sequence_length": "sequence lengths",
}
READING = (
    "Losses in nats per token, of the same tokens throughout, ± one standard error over samples: differences are "
    "paired, and the error of a share is that of a ratio of sums over samples (delta method). Samples of one document "
    "are not independent, so the errors are low rather than high, and other seeds are not in them.\n\n"
    "dense: the source under its own pattern. before: its weights under the run's pattern. after: the run. gap = "
    "before - dense; left = after - dense; recovered = (before - after) / gap. A source whose learning rate has not "
    "come down improves by further training alone, and that counts as recovered: a dense run that goes on from it for "
    "as many steps (--continued) tells how much. No share is given when the gap is not above twice its error."
)
NONE = "no share"


@dataclass(frozen=True)
class PostTrained:
    """A run at its newest checkpoint, and the one that it began with, which run.json has on `record` or not."""

    trained: TrainedRun
    source: Checkpoint
    record: bool

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.trained.folder

    @property
    def newest(self) -> Checkpoint:
        """The run's newest checkpoint."""
        return self.trained.checkpoint


@dataclass(frozen=True)
class HeldOut:
    """The first `count` held-out samples of `corpus`, cut and ordered by `config`."""

    config: Config
    corpus: Corpus
    count: int
    advance: Callable[[], object]

    def losses(self, model: Any, attention: AttentionConfig, pattern: AttentionPattern | None = None) -> Tensor:
        """Losses f64 [count, S] of a model under `attention`, or under `pattern` with its placement of separators."""
        dataset = held_out_samples(replace(self.config, attention=attention), self.corpus)
        pattern = pattern or resolve_pattern(attention, self.config.model.layers)
        return evaluate(model, pattern, dataset, self.count, self.advance).nats.double()

    def counted(self) -> Tensor | None:
        """The losses that count, bool [count, S]; None for all."""
        return text_of(held_out_samples(self.config, self.corpus), self.count).get("loss_mask")


def recovery_command(
    trained: Sequence[TrainedRun],
    output: Path | None = None,
    *,
    source: Path | None = None,
    continued: TrainedRun | None = None,
    samples: int | None = None,
    windows: Sequence[int] = (),
) -> dict[str, Any]:
    """Measure what the post-trained runs `trained` recovered, print the report and return the result.

    output: folder for recovery.json, recovery.md and the picture; None writes nothing. source: run or checkpoint folder
    of every run's source, where it is no longer where they began. continued: a run from the same source that went on
    under the source's pattern for as many tokens. samples: None for as many as validation in training takes. windows:
    numbers of neighbours n at which the weights of run and source are evaluated besides.

    Raises UserError, before anything is written, for a run that did not begin with other weights, a source that is gone
    or is another, runs of other data or held-out text, and a `continued` that does not match.
    """
    if output is not None:
        check_output(output)
    require(samples is None or samples >= 1, f"--samples {samples} must be at least 1.")
    for window in windows:
        require(window >= 1, f"--windows {window}: a window counts the token itself, so it is at least 1.")
    records.refuse_twins([run.folder for run in trained])
    runs = [post_trained(run, source) for run in trained]
    baseline = None if continued is None else post_trained(continued, source)
    every = runs if baseline is None else [*runs, baseline]
    _check_alike(every)
    if baseline is not None:
        _check_baseline(baseline, runs)
    windows = sorted(set(windows))
    with alone():
        config = runs[0].trained.config
        # Opening each checks that it is still the data of the run.
        corpus, *_ = [run.trained.corpus for run in every]
        count = min(samples or config.training.validation_samples or 1, len(held_out_samples(config, corpus)))
        passes = len({_dense_key(run) for run in runs}) + (2 + 2 * len(windows)) * len(runs) + (baseline is not None)
        with progress(passes * count, "sequence") as bar:
            rows = _rows(runs, baseline, HeldOut(config, corpus, count, lambda: bar.update()), windows)
    result = {
        "samples": count,
        "sequence_length": config.data.sequence_length,
        "held_out": config.data.validation_fraction,
        "data": {entry.prefix: entry.header.files[".bin"].sha256 for entry in corpus.sources},
        **validated_on(corpus),
        "continued": None if baseline is None else {"run": str(baseline.folder), **baseline.newest.record()},
        "runs": rows,
        "caveats": list(_caveats(every)),
    }
    if output is None:
        say(markdown(result))
    else:
        write_report(output, "recovery", result, markdown(result), figures(result))
    return result


def post_trained(run: TrainedRun, source: Path | None = None) -> PostTrained:
    """Find the checkpoint that a run began with, in the place `source` where that is given.

    Raises UserError for a run that did not begin with other weights, and a source that is gone, damaged or another.
    """
    folder = run.folder
    record = read_run_json(folder).get("initial_weights")
    if run.config.init_from is None:
        raise UserError(f"{folder} did not begin with the weights of another run: give one that was given init_from.")
    found = _recorded(folder, record, source) if record else _named(run, source)
    reason = altered(found, 0, 1)
    if reason is not None:
        raise UserError(f"{folder} began with a checkpoint that is damaged, {reason}: give a copy by --source.")
    return PostTrained(run, Checkpoint.read(found), bool(record))


def _recorded(folder: Path, record: dict[str, Any], source: Path | None) -> Path:
    """The checkpoint that run.json records, by its place or in `source`. Raises UserError unless it is the same."""
    step, place = record["step"], Path(record["checkpoint"])
    if source is not None:
        place = source
        if (source / checkpoints.FOLDER).is_dir():
            place = step_folder(source / checkpoints.FOLDER, step)
    if not (place / MANIFEST).is_file():
        raise UserError(
            f"{folder} began with step {step:,} of {record['checkpoint']}, and {place} is not there: give a run that "
            "has this checkpoint, or the checkpoint's folder, by --source."
        )
    if hash_file(place / MANIFEST).sha256 != record["manifest_sha256"]:
        raise UserError(f"{place} is not the checkpoint that {folder} began with, its content is another's.")
    return place


def _named(run: TrainedRun, source: Path | None) -> Path:
    """The checkpoint that init_from, or `source`, means today. Raises UserError when there is none, or it cannot be."""
    named = Path(run.config.init_from or "").expanduser() if source is None else source
    if not named.exists():
        raise UserError(
            f"{run.folder} began with the weights of {named}, which is not there: give its place by --source."
        )
    found = find_initial_weights(replace(run.config, init_from=str(named)), run.checkpoint.identity)
    assert found is not None
    return found


def _check_alike(runs: Sequence[PostTrained]) -> None:
    """Raise UserError unless runs and sources have data, tokenizer, held-out text and sequence length in common."""
    first = runs[0]
    compared = [(str(run.folder), run.newest.identity) for run in runs[1:]]
    # What an imported model was trained on is not known.
    compared += [(f"the source {run.source.path}", run.source.identity) for run in runs if run.source.tokens]
    for name, identity in compared:
        for key, what in SHARED.items():
            if not same_data(identity[key], first.newest.identity[key]):
                raise UserError(f"{name} and {first.folder} have different {what}: their losses do not compare.")
    for run in runs:
        for key in (ROTARY_BASE, ROTARY_SCALING):
            require(
                run.newest.identity.get(key) == run.source.identity.get(key),
                f"{run.folder} has another {key} than its source {run.source.path}, and one model evaluates the "
                "weights of both: keep the run's initial weights (training.checkpoint_steps=[0]) and compare its "
                "checkpoints by sepllm analyze loss.",
            )
        if run.source.tokens:
            checkpoints.check_unseen(run.source.identity, run.newest.identity, str(run.source.path))


def _check_baseline(baseline: PostTrained, runs: Sequence[PostTrained]) -> None:
    """Raise UserError unless `baseline` continued the source of every run, for as many tokens, under its pattern."""
    where = f"--continued {baseline.folder}"
    if _attended(baseline.newest.attention) != _attended(baseline.source.attention):
        raise UserError(f"{where} has another attention pattern than its source: give a run that went on without one.")
    for run in runs:
        if baseline.source.manifest_sha256 != run.source.manifest_sha256:
            raise UserError(
                f"{where} began with {baseline.source.path} and {run.folder} with {run.source.path}: they must begin "
                "with the same checkpoint."
            )
        if baseline.newest.tokens != run.newest.tokens:
            raise UserError(
                f"{where} was trained on {baseline.newest.tokens:,} tokens and {run.folder} on {run.newest.tokens:,}: "
                "train both for the same number of steps."
            )


def _attended(attention: AttentionConfig) -> Any:
    """Settings that decide what attention computes: a dense pattern has no window and no separators."""
    dense = attention.pattern == "dense"
    documents = (attention.separate_documents, attention.restart_positions)
    return ("dense", *documents) if dense else replace(attention, backend="auto")


def _dense_key(run: PostTrained) -> tuple[str, str]:
    """Runs of which this is the same have the same dense losses."""
    return run.source.manifest_sha256, run.trained.config.training.precision


def _rows(
    runs: Sequence[PostTrained], baseline: PostTrained | None, text: HeldOut, windows: Sequence[int]
) -> list[dict[str, Any]]:
    """Evaluate everything, one model in memory at a time, and give the figures of each run."""
    beside = None
    if baseline is not None:
        beside = text.losses(baseline.trained.load_model(), baseline.trained.config.attention)
    dense: dict[tuple[str, str], Tensor] = {}
    rows, counted = [], text.counted()
    for run in runs:
        model, attention = run.trained.load_model(), run.trained.config.attention
        patterns = {window: with_window(run.trained.pattern, window) for window in windows}
        after = text.losses(model, attention)
        after_at = {window: text.losses(model, attention, pattern) for window, pattern in patterns.items()}
        # The same model with the weights of the source, which are rounded to the run's precision.
        checkpoints.load_weights(run.source.path, [model])
        before = text.losses(model, attention)
        before_at = {window: text.losses(model, attention, pattern) for window, pattern in patterns.items()}
        key = _dense_key(run)
        if key not in dense:
            dense[key] = text.losses(model, run.source.attention)
        row = _described(run) | recovery(dense[key], before, after, beside, counted=counted)
        row["windows"] = [
            {"window": window, **recovery(dense[key], before_at[window], after_at[window], counted=counted)}
            for window in windows
        ]
        rows.append(row | {"curve": _curve(run) if row["recovered"] else None})
        del model
    return rows


def recovery(
    dense: Tensor,
    before: Tensor,
    after: Tensor,
    continued: Tensor | None = None,
    *,
    counted: Tensor | None = None,
) -> dict[str, Any]:
    """Losses, gap, what is left of it (after - dense) and the recovered share, of losses [N, S] of the same tokens, of
    which those of `counted` (bool [N, S]; None for all) count.

    Each is an Estimate. Differences are paired, and a share's error over samples is that of a ratio of sums (the delta
    method), so what samples have in common cancels. A share is None when the difference it is a share of is not above
    twice its error, or not above 0. With `continued` also its loss, after - continued, and (before - after) /
    (before - continued).
    """
    values = {"dense": dense, "before": before, "after": after, "gap": before - dense, "left": after - dense}
    if continued is not None:
        values |= {"continued": continued, "left_of_continued": after - continued}
    row: dict[str, Any] = {name: token_mean(losses, counted) for name, losses in values.items()}
    row["recovered"] = _share(before - after, before - dense, counted)
    if continued is not None:
        row["recovered_of_continued"] = _share(before - after, before - continued, counted)
    return row


def _share(gained: Tensor, gap: Tensor, counted: Tensor | None) -> Estimate | None:
    whole = token_mean(gap, counted)
    if counted is not None:
        gained, gap = gained * counted, gap * counted
    return ratio_of_sums(gained.sum(-1), gap.sum(-1)) if whole.mean > 0 and clear_of_zero(whole) else None


def _described(run: PostTrained) -> dict[str, Any]:
    """Checkpoints from which a row was computed, and lengths of training of run and source.

    An imported source has no steps on record: there they are the step of the schedule at which the run began.
    """
    source, newest, config = run.source, run.newest, run.trained.config
    optim = config.optim
    steps = source.step or optim.schedule_start
    return {
        "run": str(run.folder),
        **newest.record(),
        "precision": config.training.precision,
        "attention": {k: v for k, v in asdict(config.attention).items() if k != "backend"},
        "optim": asdict(optim),
        "source": {**source.record(), "attention": asdict(source.attention), "on_record": run.record},
        "source_steps": steps or None,
        "steps_share": newest.step / steps if steps else None,
        "tokens_share": newest.tokens / source.tokens if source.tokens else None,
    }


def _curve(run: PostTrained) -> dict[str, list[float]] | None:
    """Recovered share at each validation of a run, from metrics.jsonl of run and source: steps, shares.

    None where they were not validated on the same text, the source not at the step that the run began with, or the run
    not before its first step.
    """
    try:
        source, own = (records.read_run(folder) for folder in (run.source.path.parent.parent, run.folder))
        check_comparable([source, own])
    except UserError:
        return None
    losses = {record["step"]: record[records.LOSS] for record in own.validation}
    ends = [record[records.LOSS] for record in source.validation if record["step"] == run.source.step]
    same = source.info["comparable"].get(ALLOWED) == own.info["comparable"].get(ALLOWED)
    if not same or not ends or 0 not in losses or losses[0] <= ends[-1]:
        return None
    shares = [(losses[0] - loss) / (losses[0] - ends[-1]) for loss in losses.values()]
    return {"steps": list(losses), "recovered": shares}


def _caveats(runs: Sequence[PostTrained]) -> Iterator[str]:
    """Remarks on what the figures rest on."""
    for run in runs:
        if read_run_json(run.folder).get("status") != "finished":
            yield f"{run.folder} is not finished: its newest checkpoint is of step {run.newest.step:,}."
        if not run.record:
            yield (
                f"run.json of {run.folder} does not tell the checkpoint that it began with: {run.source.path} is what "
                "its source stands for today."
            )
        if not run.source.tokens:
            yield (
                f"{run.source.path} was imported: whether it was trained on this text is not known, and its steps, "
                "where they are told, are those at which the schedule of the run began."
            )


def markdown(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    names = _names(result["runs"])
    tables = [
        _recovered_table(result, names),
        _continued_table(result, names),
        _windows_table(result, names),
        _lengths_table(result, names),
    ]
    return "\n".join(
        [
            "# What post-training recovered\n",
            f"{result['samples']:,} held-out samples of {result['sequence_length']:,} tokens. {READING}\n",
            *(table.markdown() for table in tables if table is not None),
            *(f"{sentence}\n" for sentence in [*_without_share(result, names), *result["caveats"]]),
        ]
    )


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Recovered share by step of the runs that were validated on the same text as their source; none without one."""
    names = _names(result["runs"])
    curves: list[plots.Curve] = [
        (name, row["curve"]["steps"], row["curve"]["recovered"], {"colour": number})
        for number, (name, row) in enumerate(zip(names, result["runs"], strict=True))
        if row["curve"] is not None
    ]
    if not curves:
        return {}
    title = "Recovered share of the gap, by the validations of training"
    return {"recovered_by_step": plots.lines(title, curves, "steps of post-training", "recovered share", level=1.0)}


def _names(rows: list[dict[str, Any]]) -> list[str]:
    """Names of the runs, with their folders where two are the same."""
    names = [Path(row["run"]).resolve().name for row in rows]
    return [name if names.count(name) == 1 else f"{name} ({row['run']})" for name, row in zip(names, rows, strict=True)]


def _recovered_table(result: dict[str, Any], names: list[str]) -> Table:
    rows = [[name, _pattern(row["attention"]), *_cells(row)] for name, row in zip(names, result["runs"], strict=True)]
    return Table("Recovered", ["run", "pattern", "dense", "before", "gap", "after", "left", "recovered"], rows)


def _continued_table(result: dict[str, Any], names: list[str]) -> Table | None:
    if result["continued"] is None:
        return None
    rows = [
        [name, shown(row["continued"]), signed(row["left_of_continued"]), _share_cell(row["recovered_of_continued"])]
        for name, row in zip(names, result["runs"], strict=True)
    ]
    title = f"Beside {Path(result['continued']['run']).resolve().name}, the source trained on for as many tokens"
    header = ["run", "continued", "after - continued", "(before - after) / (before - continued)"]
    return Table(title, header, rows)


def _windows_table(result: dict[str, Any], names: list[str]) -> Table | None:
    rows = [
        [f"{name}, n = {entry['window']}", *_cells(entry)]
        for name, row in zip(names, result["runs"], strict=True)
        for entry in row["windows"]
    ]
    header = ["run", "dense", "before", "gap", "after", "left", "recovered"]
    return Table("The same weights with other windows", header, rows) if rows else None


def _lengths_table(result: dict[str, Any], names: list[str]) -> Table:
    rows = []
    for name, row in zip(names, result["runs"], strict=True):
        source, optim = row["source"], row["optim"]
        schedule = f"from {optim['schedule_start']:,}" if optim["schedule_start"] else "anew"
        rows.append(
            [
                name,
                "-" if row["source_steps"] is None else f"{row['source_steps']:,}",
                quantity(source["tokens"]) if source["tokens"] else "-",
                f"{row['step']:,}",
                quantity(row["tokens"]),
                *("-" if row[key] is None else f"{row[key]:.1%}" for key in ("steps_share", "tokens_share")),
                f"{optim['lr']:g}",
                schedule,
            ]
        )
    header = ["run", "source's steps", "its tokens", "steps", "tokens", "of its steps", "of its tokens", "lr"]
    return Table("Length of training", [*header, "schedule"], rows)


def _cells(row: dict[str, Any]) -> list[str]:
    """Cells of the losses and what follows from them."""
    losses = [shown(row["dense"]), shown(row["before"]), signed(row["gap"]), shown(row["after"]), signed(row["left"])]
    return [*losses, _share_cell(row["recovered"])]


def _share_cell(estimate: Estimate | None) -> str:
    return NONE if estimate is None else f"{estimate.mean:.1%} ± {estimate.error:.1%}"


def _pattern(attention: dict[str, Any]) -> str:
    return (
        attention["pattern"]
        if attention["pattern"] == "dense"
        else f"{attention['pattern']}, n = {attention['window']}"
    )


def _without_share(result: dict[str, Any], names: list[str]) -> list[str]:
    """A remark on each run of which no share can be given."""
    sentences = []
    for name, row in zip(names, result["runs"], strict=True):
        if row["recovered"] is None:
            sentences.append(
                f"{name}: no share can be given, its gap of {signed(row['gap'])} is not above 0 by more than twice its "
                f"error on {result['samples']:,} samples."
            )
    return sentences

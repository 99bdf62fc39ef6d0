"""sepllm analyze: what separators do in a corpus, in a trained model's attention and in its loss."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sepllm_train.base.errors import UserError
from sepllm_train.cli import flags
from sepllm_train.config.present import require_dataset

if TYPE_CHECKING:
    from sepllm_train.runs.open import TrainedRun


def main(words: Sequence[str]) -> None:
    """Run a sub-command. Raises UserError."""
    parser = flags.parser("analyze", "Measure what separators do in a corpus, in a model's attention and in its loss.")
    commands = flags.subcommands(parser)
    for add in (_add_corpus, _add_attention, _add_loss, _add_ablate, _add_recovery):
        add(commands)
    arguments = parser.parse_args(words)
    arguments.run(arguments)


def _command(
    commands: flags.Subcommands, name: str, summary: str, run: Callable[[argparse.Namespace], None], example: str
) -> flags.Parser:
    command = flags.subcommand(commands, name, summary, run, example)
    command.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the result is written")
    return command


def _add_corpus(commands: flags.Subcommands) -> None:
    command = _command(
        commands,
        "corpus",
        "Density and gaps of every separator class in each domain: a dataset, a .txt file, or a `source` of .jsonl.",
        _run_corpus,
        "data/books --output analysis/corpus",
    )
    command.add_argument("inputs", nargs="+", metavar="PREFIX_OR_FILE", help="datasets, or .txt and .jsonl files")
    command.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json or .model, needed for text files")
    command.add_argument("--unwrap", action="store_true", help="join the hard-wrapped lines of books in text files")


def _run_corpus(arguments: argparse.Namespace) -> None:
    from data_prep.sidecar import read_header

    for name in arguments.inputs:
        if not Path(name).suffix and not Path(name).exists():
            read_header(name)  # tells that it is not there, before torch is imported
    from sepllm_train.analysis.corpus import corpus_command

    corpus_command(arguments.inputs, arguments.output, tokenizer=arguments.tokenizer, unwrap=arguments.unwrap)


def _add_run(command: flags.Parser, samples: int) -> None:
    flags.add_run(command)
    command.add_argument("--data", metavar="PREFIX", help="another dataset made with the run's tokenizer")
    command.add_argument(
        "--held-out", type=float, metavar="SHARE", help="share of its last tokens (default: the run's)"
    )
    command.add_argument(
        "--samples", type=int, default=samples, metavar="N", help=f"held-out samples, as far as there are ({samples})"
    )


def _require(arguments: argparse.Namespace) -> None:
    """Raise UserError for a run, a dataset or numbers that cannot be: before torch is imported."""
    flags.at_least(arguments, 1, "samples")
    flags.require_run(arguments.run_folder, arguments.checkpoint)
    if arguments.held_out is not None and not 0 <= arguments.held_out < 1:
        raise UserError(f"--held-out {arguments.held_out} must be at least 0 and below 1.")
    if arguments.data is not None:
        require_dataset(arguments.data)
    output: Path = arguments.output
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: it must be a folder.")


def _run(arguments: argparse.Namespace) -> TrainedRun:
    from sepllm_train.runs.open import open_run

    return open_run(arguments.run_folder, arguments.checkpoint, data=arguments.data, held_out=arguments.held_out)


def _add_attention(commands: flags.Subcommands) -> None:
    command = _command(
        commands,
        "attention",
        "Attention that separators, initial tokens and neighbours receive in a trained model, by layer and head.",
        _run_attention,
        "runs/books_sep --output analysis/attention",
    )
    _add_run(command, 8)
    flags.add_settings(command, ("classes", "window", "initial"))
    command.add_argument(
        "--layers", type=flags.numbers, metavar="LIST", help="layers to look at, from 0 (default: all)"
    )
    command.add_argument("--heads", type=flags.numbers, metavar="LIST", help="heads to look at, from 0 (default: all)")


def _run_attention(arguments: argparse.Namespace) -> None:
    _require(arguments)
    from sepllm_train.analysis.attention import MassOptions, attention_command

    options = MassOptions(
        classes=arguments.classes,
        window=arguments.window,
        initial=arguments.initial,
        layers=arguments.layers,
        heads=arguments.heads,
    )
    attention_command(_run(arguments), arguments.output, options, arguments.samples)


def _add_loss(commands: flags.Subcommands) -> None:
    command = _command(
        commands,
        "loss",
        "Loss of a trained model under other attention patterns, on held-out documents.",
        _run_loss,
        "runs/books_sep --drop-classes --windows 16,32,64,128,256 --far-recall --output analysis/loss",
    )
    _add_run(command, 32)
    command.add_argument("--drop-classes", action="store_true", help="leave out each class of separators in turn")
    command.add_argument(
        "--windows", type=flags.numbers, default=[], metavar="LIST", help="windows n, such as 16,32,64"
    )
    command.add_argument("--lengths", type=flags.numbers, default=[], metavar="LIST", help="sequence lengths S")
    command.add_argument("--far-recall", action="store_true", help="tell far-recall tokens from others")
    command.add_argument(
        "--attention",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="pattern to vary (default: the run's; the paper's for a dense run), such as window=128 separators=all",
    )


def _run_loss(arguments: argparse.Namespace) -> None:
    _require(arguments)
    from sepllm_train.analysis.losses import LossOptions, loss_command

    questions = LossOptions(
        drop_classes=arguments.drop_classes,
        windows=arguments.windows,
        lengths=arguments.lengths,
        far_recall=arguments.far_recall,
        attention=arguments.attention,
    )
    loss_command(_run(arguments), arguments.output, questions, arguments.samples)


def _add_ablate(commands: flags.Subcommands) -> None:
    command = _command(
        commands,
        "ablate",
        "Loss of a trained model with some of the separators, and with other tokens at as many keys kept.",
        _run_ablate,
        "runs/books_dense --window 64 --output analysis/ablation",
    )
    _add_run(command, 32)
    flags.add_settings(command, ("window", "initial"))
    command.add_argument(
        "--subsets",
        nargs="+",
        default=[],
        metavar="[NAME=]CLASSES",
        help="subsets of separators (default: nine, four, two, line breaks and each class), such as period,question",
    )


def _run_ablate(arguments: argparse.Namespace) -> None:
    _require(arguments)
    from sepllm_train.analysis.ablation import AblationOptions, ablation_command

    options = AblationOptions(window=arguments.window, initial=arguments.initial, subsets=arguments.subsets)
    ablation_command(_run(arguments), arguments.output, options, arguments.samples)


def _add_recovery(commands: flags.Subcommands) -> None:
    summary = "Loss of a model before and after its post-training, beside the model that it began with."
    example = "runs/posttrain_pythia1.4b --continued runs/dense_on --output analysis/recovery"
    command = flags.subcommand(commands, "recovery", summary, _run_recovery, example)
    add = command.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="runs that began with init_from")
    add("--continued", type=Path, metavar="RUN", help="their source, trained on for as many tokens")
    add("--source", type=Path, metavar="RUN", help="where their source is now, if it was moved")
    add("--windows", type=flags.numbers, default=[], metavar="LIST", help="windows n to evaluate besides: 16,32,64")
    add("--samples", type=int, metavar="N", help="held-out samples (default: as many as validation in training takes)")
    add("--output", type=Path, metavar="DIR", help="where the result is written (default: nowhere)")


def _run_recovery(arguments: argparse.Namespace) -> None:
    arguments.runs = flags.all_runs(arguments.runs)
    for folder in (*arguments.runs, arguments.continued):
        if folder is not None:
            flags.require_run(folder)
    from sepllm_train.analysis.recovery import recovery_command
    from sepllm_train.runs.open import open_run

    recovery_command(
        [open_run(folder) for folder in arguments.runs],
        arguments.output,
        source=arguments.source,
        continued=None if arguments.continued is None else open_run(arguments.continued),
        samples=arguments.samples,
        windows=arguments.windows,
    )

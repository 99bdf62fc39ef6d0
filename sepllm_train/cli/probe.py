"""sepllm probe: text with facts to train on, and questions to what was trained."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sepllm_train.base.files import write_whole
from sepllm_train.cli import flags
from sepllm_train.config.schema import require


def main(words: Sequence[str]) -> None:
    """Run a sub-command. Raises UserError."""
    arguments = _parser().parse_args(words)
    arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = flags.parser(
        "probe",
        "Is a separator a summary of its segment, or a sink?",
        "text books.jsonl --tokenizer data/books.tokenizer.model --output data/facts.jsonl\n"
        "ask runs/probe_seed1 runs/probe_seed2 runs/probe_seed3 --text unseen.txt --output runs/probe",
    )
    commands = flags.subcommands(parser)
    summary = "write text with facts that are mentioned again and again, as .jsonl"
    text = flags.subcommand(commands, "text", summary, _text)
    text.add_argument("inputs", nargs="+", type=Path, metavar="FILE", help="real text to put them in: .txt or .jsonl")
    text.add_argument("--tokenizer", required=True, metavar="FILE", help="in which keys and values are single tokens")
    text.add_argument("--output", required=True, type=Path, metavar="FILE", help=".jsonl file to write")
    text.add_argument("--documents", type=int, default=12000, metavar="N", help="documents to write (12000)")
    text.add_argument(
        "--facts", type=flags.numbers, default=(1, 2, 4), metavar="LIST", help="facts of a document (1,2,4)"
    )
    text.add_argument("--sentences", type=int, default=80, metavar="N", help="sentences of a document, facts too (80)")
    text.add_argument(
        "--shares",
        type=flags.shares,
        default=(0.3, 0.7),
        metavar="LIST",
        help="shares of facts in a document (0.3,0.7)",
    )
    text.add_argument("--seed", type=int, default=1, metavar="N", help="of all that is random (1)")
    ask = flags.subcommand(commands, "ask", "ask trained runs that differ in their seed", _ask)
    ask.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, one a seed")
    ask.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the result is written")
    ask.add_argument("--samples", type=int, default=128, metavar="N", help="held-out samples (128)")
    ask.add_argument("--needles", type=int, default=32, metavar="N", help="needles for each distance (32)")
    ask.add_argument(
        "--text", nargs="+", type=Path, default=[], metavar="FILE", help="real text to hide needles in; none without it"
    )
    ask.add_argument("--seed", type=int, default=0, metavar="N", help="of needles and of the choice of donors (0)")
    return parser


def _text(arguments: argparse.Namespace) -> None:
    from data_prep.readers import Corpus
    from data_prep.tokenizers import load_tokenizer
    from sepllm_train.analysis.probe.facts import KEYS, documents, sentences, vocabulary_of

    output: Path = arguments.output
    require(not output.exists(), f"--output {output} is there already: choose another name.")
    require(output.suffix == ".jsonl", f"--output {output} must be a .jsonl file.")
    require(output.parent.is_dir(), f"--output {output}: there is no folder {output.parent}.")
    for facts in arguments.facts:
        require(1 <= facts <= KEYS, f"--facts {facts} must be 1 to {KEYS}: a document has a key once.")
    for share in arguments.shares:
        require(0 < share < 1, f"--shares {share:g} must be above 0 and below 1.")
    flags.at_least(arguments, 1, "documents", "sentences")
    tokenizer = load_tokenizer(arguments.tokenizer)
    found = documents(
        sentences(document.text for document in Corpus(arguments.inputs)),
        tokenizer,
        vocabulary_of(tokenizer),
        facts=arguments.facts,
        items=arguments.sentences,
        shares=arguments.shares,
        seed=arguments.seed,
    )
    lines = [
        json.dumps({"id": number, "text": text})
        for number, text in zip(range(arguments.documents), found, strict=False)
    ]
    require(bool(lines), f"{', '.join(map(str, arguments.inputs))} is too short for one document.")
    write_whole(output, ("\n".join(lines) + "\n").encode())
    print(f"{output}: {len(lines):,} documents of {arguments.sentences} sentences")
    if len(lines) < arguments.documents:
        print(f"warning: the text ended before {arguments.documents:,} documents.", file=sys.stderr)


def _ask(arguments: argparse.Namespace) -> None:
    flags.at_least(arguments, 1, "samples", "needles")
    arguments.runs = flags.all_runs(arguments.runs)
    for folder in arguments.runs:
        flags.require_run(folder)
    for path in arguments.text:
        flags.require_file(path, "--text")

    from sepllm_train.analysis.probe.study import ProbeOptions, ask
    from sepllm_train.runs.open import open_run

    ask(
        [open_run(folder) for folder in arguments.runs],
        arguments.output,
        ProbeOptions(arguments.samples, arguments.needles, arguments.text, arguments.seed),
    )

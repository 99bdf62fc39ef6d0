"""The command line of the probe: text with facts to train on, and the questions to what was trained."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.readers import Corpus
from data_prep.tokenizers import load_tokenizer
from sepllm_train.base.errors import exit_code
from sepllm_train.base.files import write_whole
from sepllm_train.config.schema import require


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; gives the exit code: 0, or 2 after one sentence on a user's mistake."""
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Is a separator a summary of its segment, or a sink?")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    text = commands.add_parser("text", help="write text with facts that are mentioned again and again, as .jsonl")
    text.add_argument("inputs", nargs="+", type=Path, metavar="FILE", help="real text to put them in: .txt or .jsonl")
    text.add_argument("--tokenizer", required=True, metavar="FILE", help="in which keys and values are single tokens")
    text.add_argument("--output", required=True, type=Path, metavar="FILE", help=".jsonl file to write")
    text.add_argument("--documents", type=int, default=12000, metavar="N", help="documents to write (12000)")
    text.add_argument("--facts", type=_counts, default=(1, 2, 4), metavar="LIST", help="facts of a document (1,2,4)")
    text.add_argument("--sentences", type=int, default=80, metavar="N", help="sentences of a document, facts too (80)")
    text.add_argument(
        "--shares", type=_shares, default=(0.3, 0.7), metavar="LIST", help="shares of facts in a document (0.3,0.7)"
    )
    text.add_argument("--seed", type=int, default=1, metavar="N", help="of all that is random (1)")
    text.set_defaults(run=_text)
    ask = commands.add_parser("ask", help="ask trained runs that differ in their seed")
    ask.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, one a seed")
    ask.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the result is written")
    ask.add_argument("--samples", type=int, default=128, metavar="N", help="held-out samples (128)")
    ask.add_argument("--needles", type=int, default=32, metavar="N", help="needles for each distance (32)")
    ask.add_argument(
        "--text", nargs="+", type=Path, default=[], metavar="FILE", help="real text to hide needles in; none without it"
    )
    ask.add_argument("--seed", type=int, default=0, metavar="N", help="of needles and of the choice of donors (0)")
    ask.set_defaults(run=_ask)
    return parser


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,2,4") from None


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of shares such as 0.3,0.9") from None


def _text(arguments: argparse.Namespace) -> None:
    from sepllm_train.analysis.probe.facts import KEYS, documents, sentences, vocabulary_of

    output: Path = arguments.output
    require(not output.exists(), f"--output {output} is there already: choose another name.")
    require(output.suffix == ".jsonl", f"--output {output} must be a .jsonl file.")
    require(output.parent.is_dir(), f"--output {output}: there is no folder {output.parent}.")
    for facts in arguments.facts:
        require(1 <= facts <= KEYS, f"--facts {facts} must be 1 to {KEYS}: a document has a key once.")
    for share in arguments.shares:
        require(0 < share < 1, f"--shares {share:g} must be above 0 and below 1.")
    for name in ("documents", "sentences"):
        require(getattr(arguments, name) >= 1, f"--{name} {getattr(arguments, name)} must be at least 1.")
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
    from sepllm_train.analysis.probe.study import ProbeOptions, ask
    from sepllm_train.runs.open import open_run

    for name in ("samples", "needles"):
        require(getattr(arguments, name) >= 1, f"--{name} {getattr(arguments, name)} must be at least 1.")
    ask(
        [open_run(folder) for folder in arguments.runs],
        arguments.output,
        ProbeOptions(arguments.samples, arguments.needles, arguments.text, arguments.seed),
    )

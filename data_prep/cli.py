"""The command line of data preparation: tokenize, merge, annotate, train-tokenizer, stats, verify."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeAlias

from sepllm_train.base.errors import UserError

if TYPE_CHECKING:
    from data_prep.shards import ShardHeader
    from data_prep.sidecar import SidecarHeader

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_PROGRAM = "sepllm prepare"
_TEXT_INPUTS = (
    ".txt (one document each) or .jsonl (one document a line), plain or .gz, .bz2, .xz, .zst; .parquet (one document a "
    "row); a folder of these; or a glob in quotes"
)


def run(words: Sequence[str]) -> None:
    """Run one sub-command. Raises UserError, also for a full disk or a folder without permission."""
    arguments = _parser().parse_args(words)
    try:
        arguments.run(arguments)
    except OSError as error:
        raise UserError(f"{error.filename or 'Writing failed'}: {error.strerror}.") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM, description="Turn text into tokens with separator classes, and look after such datasets."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_tokenize(commands)
    _add_merge(commands)
    _add_annotate(commands)
    _add_train_tokenizer(commands)
    _add_stats(commands)
    _add_verify(commands)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 1 to N, as 3/16")
    return number, count


def _command(commands: _Commands, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {_PROGRAM} {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_text_inputs(command: argparse.ArgumentParser) -> None:
    command.add_argument("inputs", nargs="+", metavar="INPUT", help=_TEXT_INPUTS)
    command.add_argument("--field", default="text", help="field or column that holds the text (default: text)")
    command.add_argument("--strict", action="store_true", help="stop at a document that is not UTF-8 (else: skip it)")
    command.add_argument("--unwrap", action="store_true", help="join the hard-wrapped lines of books")
    command.add_argument("--workers", type=_positive, metavar="N", help="threads (default: all cores)")
    command.add_argument("--overwrite", action="store_true", help="replace existing output")


def _add_tokenize(commands: _Commands) -> None:
    command = _command(
        commands,
        "tokenize",
        "Tokenise text into PREFIX.bin and .idx (megatron-core's format) with the separator side-car.",
        "books/*.jsonl.zst --unwrap --tokenizer tokenizer.json --output data/books",
    )
    _add_text_inputs(command)
    command.add_argument("--output", required=True, metavar="PREFIX", help="path of the dataset without a suffix")
    command.add_argument("--tokenizer", required=True, metavar="FILE", help="tokenizer.json or SentencePiece .model")
    command.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="tokenize only the I-th (from 1 on) of N shares of the documents, for `merge`; a finished one is kept",
    )
    command.set_defaults(run=_run_tokenize)


def _run_tokenize(arguments: argparse.Namespace) -> None:
    options = {
        "text_field": arguments.field,
        "unwrap": arguments.unwrap,
        "strict": arguments.strict,
        "workers": arguments.workers,
        "overwrite": arguments.overwrite,
    }
    if arguments.shard is not None:
        _run_tokenize_shard(arguments, options)
        return
    from data_prep.tokenize import tokenize_files

    start = time.perf_counter()
    header, corpus = tokenize_files(arguments.inputs, arguments.output, arguments.tokenizer, **options)
    _print_written(arguments.output, header, time.perf_counter() - start)
    _print_skipped(corpus.skipped, corpus.empty)


def _run_tokenize_shard(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    from data_prep.shards import shard_prefix, tokenize_shard

    start = time.perf_counter()
    header, written = tokenize_shard(
        arguments.inputs, arguments.output, arguments.tokenizer, arguments.shard, **options
    )
    prefix = shard_prefix(arguments.output, *arguments.shard)
    if not written:
        print(f"{prefix} was finished before and is left as it is ({header.tokens:,} tokens)")
        return
    _print_written(str(prefix), header, time.perf_counter() - start)
    _print_skipped(header.skipped, header.empty)


def _print_written(name: str, header: SidecarHeader | ShardHeader, seconds: float) -> None:
    print(
        f"{name}: {header.tokens:,} tokens in {header.documents:,} documents, "
        f"{header.bytes / max(header.tokens, 1):.3f} bytes per token, {seconds:.1f} s "
        f"({header.tokens / seconds:,.0f} tokens/s)"
    )


def _print_skipped(skipped: int, empty: int) -> None:
    if skipped or empty:
        print(f"skipped {skipped:,} documents that are not UTF-8 and {empty:,} without text")


def _add_merge(commands: _Commands) -> None:
    command = _command(
        commands,
        "merge",
        "Make a dataset of all its shards, byte for byte as one process would; the shards stay.",
        "data/books",
    )
    command.add_argument("output", metavar="OUTPUT", help="path of the dataset without a suffix")
    command.add_argument("shards", nargs="*", metavar="SHARD", help="its .shard.json (default: those beside OUTPUT)")
    command.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    command.set_defaults(run=_run_merge)


def _run_merge(arguments: argparse.Namespace) -> None:
    from data_prep.shards import merge

    start = time.perf_counter()
    header, shards = merge(arguments.output, arguments.shards, overwrite=arguments.overwrite)
    _print_written(arguments.output, header, time.perf_counter() - start)
    _print_skipped(sum(shard.skipped for shard in shards), sum(shard.empty for shard in shards))
    print(f"{len(shards):,} shards were merged and can be removed")


def _add_annotate(commands: _Commands) -> None:
    command = _command(
        commands,
        "annotate",
        "Write the separator side-car of an existing megatron-core dataset (PREFIX.bin and .idx).",
        "data/pile_text_document --tokenizer 20B_tokenizer.json",
    )
    command.add_argument("prefix", metavar="PREFIX", help="path of the dataset without a suffix")
    command.add_argument("--tokenizer", required=True, metavar="FILE", help="the tokenizer the dataset was made with")
    command.add_argument("--overwrite", action="store_true", help="replace an existing side-car")
    command.set_defaults(run=_run_annotate)


def _run_annotate(arguments: argparse.Namespace) -> None:
    from data_prep.annotate import annotate

    header = annotate(arguments.prefix, arguments.tokenizer, overwrite=arguments.overwrite)
    separators = sum(entry.count for entry in header.classes)
    print(f"{arguments.prefix}: {separators:,} separators of any class among {header.tokens:,} tokens")


def _add_train_tokenizer(commands: _Commands) -> None:
    command = _command(
        commands,
        "train-tokenizer",
        "Train a lossless SentencePiece tokenizer: decoding what it encoded gives back every text exactly.",
        "books/*.txt --vocab-size 16000 --output books.model",
    )
    _add_text_inputs(command)
    command.add_argument("--vocab-size", type=_positive, required=True, metavar="N", help="entries, 256 bytes included")
    command.add_argument("--output", required=True, metavar="FILE", help="the .model file to write")
    command.add_argument("--type", choices=("bpe", "unigram"), default="bpe", help="algorithm (default: bpe)")
    command.add_argument(
        "--sentences",
        type=_positive,
        default=1_000_000,
        metavar="N",
        help="lines held in memory (default: 1000000)",
    )
    command.set_defaults(run=_run_train_tokenizer)


def _run_train_tokenizer(arguments: argparse.Namespace) -> None:
    from data_prep.inputs import find_inputs
    from data_prep.readers import Corpus
    from data_prep.tokenize import usable_cores
    from data_prep.train_tokenizer import train_tokenizer

    corpus = Corpus(find_inputs(arguments.inputs), arguments.field, arguments.strict, arguments.unwrap)
    train_tokenizer(
        (document.text for document in corpus),
        arguments.output,
        vocab_size=arguments.vocab_size,
        model_type=arguments.type,
        sentences=arguments.sentences,
        workers=arguments.workers or usable_cores(),
        overwrite=arguments.overwrite,
    )
    print(f"{arguments.output}: {arguments.vocab_size:,} entries")


def _add_stats(commands: _Commands) -> None:
    command = _command(
        commands,
        "stats",
        "Show density and distances of the separators, and the share of the causal triangle that they make visible.",
        "data/books --separators paper --window 128 --length 4096",
    )
    command.add_argument("prefix", metavar="PREFIX", help="path of the dataset without a suffix")
    command.add_argument("--initial", type=int, default=3, metavar="A", help="initial tokens (default: 3)")
    command.add_argument("--window", type=int, default=64, metavar="N", help="neighbours with itself (default: 64)")
    command.add_argument("--length", type=int, default=2048, metavar="S", help="tokens of a sequence (default: 2048)")
    command.add_argument("--separators", default="paper", help="paper, all, or class names (default: paper)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_run_stats)


def _run_stats(arguments: argparse.Namespace) -> None:
    from data_prep.stats import format_statistics, statistics

    result = statistics(
        arguments.prefix,
        separators=arguments.separators,
        initial=arguments.initial,
        window=arguments.window,
        length=arguments.length,
    )
    print(json.dumps(asdict(result), ensure_ascii=False) if arguments.json else format_statistics(result))


def _add_verify(commands: _Commands) -> None:
    command = _command(
        commands,
        "verify",
        "Check a dataset against its header: lengths, hashes, tokenizer, token range, separator classes.",
        "data/books --tokenizer tokenizer.json",
    )
    command.add_argument("prefix", metavar="PREFIX", help="path of the dataset without a suffix")
    command.add_argument("--tokenizer", metavar="FILE", help="also check that the dataset was made with this tokenizer")
    command.set_defaults(run=_run_verify)


def _run_verify(arguments: argparse.Namespace) -> None:
    from data_prep.verify import verify

    header = verify(arguments.prefix, arguments.tokenizer)
    print(f"{arguments.prefix}: {header.tokens:,} tokens in {header.documents:,} documents are as their header says")

"""sepllm stream: text without end through a cache of bounded size."""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sepllm_train.cli import flags
from sepllm_train.generation.choice import AttentionChoice


def main(words: Sequence[str]) -> None:
    """Run a sub-command. Raises UserError, and KeyboardInterrupt after a signal."""
    arguments = _parser().parse_args(words)
    arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = flags.parser(
        "stream",
        "Score or continue text without end, token by token, through a cache of bounded size.",
        "score runs/NAME --text books.jsonl.bz2 --tokens 4194304 --output streams/sep\n"
        "chat runs/NAME --temperature 0.8\n"
        "report streams/sep streams/streaming --at 1048576,4194304",
    )
    commands = flags.subcommands(parser)
    score = flags.subcommand(commands, "score", "perplexity of a text, token by token; resumable", _score)
    _add_model(score)
    add = score.add_argument
    add("--text", nargs="+", required=True, metavar="FILE", help=".txt or .jsonl, also compressed")
    add("--unwrap", action="store_true", help="join the hard-wrapped lines of books")
    add("--repeat", action="store_true", help="begin the text again at its end")
    add("--tokens", type=int, metavar="N", help="at most so many (default: the whole text)")
    add("--chunk", type=int, default=1024, metavar="N",
        help="tokens given to the model in a call; changes nothing but the speed (1024)")  # fmt: skip
    add("--every", type=int, default=65536, metavar="N", help="tokens between points (65536)")
    add("--save-every", type=float, default=60.0, metavar="SECONDS", help="between saved states (60)")
    add("--output", type=Path, required=True, metavar="DIR", help="result and state of the stream")
    chat = flags.subcommand(commands, "chat", "continue each line that is typed, in one cache", _chat)
    _add_model(chat)
    chat.add_argument("--tokens", type=int, default=100, metavar="N", help="at most so many per answer (100)")
    flags.add_sampling(chat.add_argument_group("sampling"))
    report = flags.subcommand(commands, "report", "a table of finished streams", _report)
    report.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="outputs of `sepllm stream score`")
    report.add_argument(
        "--at", type=flags.numbers, default=[], metavar="LIST", help="numbers of tokens, such as 1048576"
    )
    report.add_argument("--output", type=Path, metavar="FILE", help="write the table there (default: print it)")
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    flags.add_model(command)
    cache = command.add_argument_group("cache, sizes in tokens")
    flags.add_attention(cache, "cache", "sep")
    cache.add_argument("--strict", action="store_true", help="refuse another pattern than that of training")


def _open(arguments: argparse.Namespace, choice: AttentionChoice) -> tuple[Any, Any, AttentionChoice]:
    """The model, its cache, and the choice with the model's defaults."""
    device = flags.prepare_device(arguments)
    from sepllm_train.evaluation.stream_model import make_cache, open_model, settled_for

    opened = open_model(arguments.model, arguments.tokenizer, arguments.dtype, device)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        cache = make_cache(opened, choice, strict=arguments.strict)
    for warning in told:
        print(f"note: {warning.message}", file=sys.stderr)
    return opened, cache, settled_for(opened, choice)


def _score(arguments: argparse.Namespace) -> None:
    from sepllm_train.evaluation.options import ScoreOptions
    from sepllm_train.evaluation.stream_text import TokenStream, check_output, check_text

    how = ScoreOptions(arguments.tokens, arguments.chunk, arguments.every, arguments.save_every)
    how.check()
    choice = flags.choice(arguments, "cache")
    # Before the model, which takes long to load.
    check_text(arguments.text)
    check_output(arguments.output)
    flags.require_model(arguments)
    opened, cache, choice = _open(arguments, choice)
    from sepllm_train.evaluation.stream_score import score

    text = TokenStream(arguments.text, opened.tokenizer, unwrap=arguments.unwrap, repeat=arguments.repeat)
    score(opened, cache, choice, text, how, arguments.output)


def _chat(arguments: argparse.Namespace) -> None:
    from sepllm_train.generation.sampling import Sampling

    sampling = Sampling(flags.temperature(arguments), arguments.top_k, arguments.top_p, arguments.seed)
    flags.at_least(arguments, 1, "tokens")
    choice = flags.choice(arguments, "cache")
    flags.require_model(arguments)
    opened, cache, choice = _open(arguments, choice)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    from sepllm_train.evaluation.stream_chat import chat

    chat(opened, cache, choice.name, sampling, arguments.tokens, sys.stdin)


def _report(arguments: argparse.Namespace) -> None:
    from sepllm_train.base.files import write_whole
    from sepllm_train.evaluation.stream_report import report

    table = report(arguments.folders, arguments.at)
    if arguments.output is None:
        print(table, end="")
    else:
        write_whole(arguments.output, table.encode())

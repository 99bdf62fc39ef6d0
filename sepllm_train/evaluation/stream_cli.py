"""The command line of streams: score, chat, report."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sepllm_train.base.errors import EXIT_USER_ERROR, UserError
from sepllm_train.evaluation.stream_model import CACHES, POSITIONS, CacheOptions

_PROGRAM = "stream.py"
# What the shell gives for a program that SIGPIPE ended.
EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; gives the exit code: 0, or 2 after one sentence on a user's mistake."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "safetensors"):
            raise
        print(f"error: {error.name} is not installed: pip install -e '.[hf]' in the checkout.", file=sys.stderr)
        return EXIT_USER_ERROR
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Nobody reads on. What is still in the buffer would complain at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_PROGRAM, description="Text without end through a cache of bounded size.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    score = commands.add_parser("score", help="perplexity of a text, token by token; resumable")
    _add_model(score)
    score.add_argument("--text", nargs="+", required=True, metavar="FILE", help=".txt or .jsonl, also compressed")
    score.add_argument("--unwrap", action="store_true", help="join the hard-wrapped lines of books")
    score.add_argument("--repeat", action="store_true", help="begin the text again at its end")
    score.add_argument("--tokens", type=int, metavar="N", help="at most so many (default: the whole text)")
    score.add_argument("--chunk", type=int, default=1024, metavar="N",
                       help="tokens given to the model in a call; changes nothing but the speed (1024)")  # fmt: skip
    score.add_argument("--every", type=int, default=65536, metavar="N", help="tokens between points (65536)")
    score.add_argument("--save-every", type=float, default=60.0, metavar="SECONDS", help="between saved states (60)")
    score.add_argument("--output", type=Path, required=True, metavar="DIR", help="result and state of the stream")
    score.set_defaults(run=_run_score)
    chat = commands.add_parser("chat", help="continue each line that is typed, in one cache")
    _add_model(chat)
    chat.add_argument("--tokens", type=int, default=100, metavar="N", help="at most so many per answer (100)")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    chat.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens (default: all)")
    chat.add_argument("--top-p", type=float, metavar="P", help="the likeliest tokens of this probability (default: 1)")
    chat.add_argument("--seed", type=int, default=0)
    chat.set_defaults(run=_run_chat)
    report = commands.add_parser("report", help="a table of finished streams")
    report.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="outputs of stream.py score")
    report.add_argument("--at", type=_numbers, default=[], metavar="LIST", help="numbers of tokens, such as 1048576")
    report.add_argument("--output", type=Path, metavar="FILE", help="write the table there (default: print it)")
    report.set_defaults(run=_run_report)
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="RUN_OR_MODEL", help="a run of ours, or a folder of a transformers model")
    command.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json or .model (default: the model's own)")
    command.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    cache = command.add_argument_group("cache")
    cache.add_argument("--cache", choices=CACHES, default="sep", help="which keys stay (sep)")
    cache.add_argument("--initial", type=int, default=4, metavar="A", help="first tokens that stay (4)")
    cache.add_argument("--separators", type=int, default=64, metavar="S", help="separators that stay (64)")
    cache.add_argument("--window", type=int, default=224, metavar="W", help="newest tokens that stay (224)")
    cache.add_argument("--capacity", type=int, metavar="C", help="keys at which others are dropped (sep: 324)")
    cache.add_argument("--interval", type=int, metavar="D", help="fixed: every D-th token in place of separators")
    cache.add_argument("--positions", choices=POSITIONS, help="places in the cache (default), or in the text: up to"
                       " the model's context (training) or beyond (absolute)")  # fmt: skip
    cache.add_argument("--classes", default="paper", metavar="NAMES", help="classes of separators (paper)")
    cache.add_argument("--strict", action="store_true", help="refuse another pattern than that of training")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1048576,4194304") from None


def _open(arguments: argparse.Namespace) -> tuple[Any, Any, CacheOptions]:
    import torch

    from sepllm_train.evaluation.stream_model import make_cache, open_model

    _check_device(arguments.device)
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise UserError(f"--threads={arguments.threads} must be at least 1.")
        torch.set_num_threads(arguments.threads)
    capacity = arguments.capacity
    if capacity is None and arguments.cache == "sep":
        capacity = 324
    options = CacheOptions(
        cache=arguments.cache,
        initial=arguments.initial,
        separators=arguments.separators,
        window=arguments.window,
        capacity=capacity,
        interval=arguments.interval,
        positions=arguments.positions,
        classes=arguments.classes,
        strict=arguments.strict,
    )
    opened = open_model(arguments.model, arguments.tokenizer, arguments.dtype, arguments.device)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        cache = make_cache(opened, options)
    for warning in told:
        print(f"note: {warning.message}", file=sys.stderr)
    return opened, cache, options


def _check_device(name: str) -> None:
    """Raise UserError for a device that is not there."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is unknown: use cpu, cuda or cuda:N.")
    count = torch.cuda.device_count()
    if device.type == "cuda" and not count:
        raise UserError(f"--device {name}: there is no GPU here; use cpu.")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device {name}: there are {count} GPUs here; use one up to cuda:{count - 1}.")


def _run_score(arguments: argparse.Namespace) -> None:
    from sepllm_train.evaluation.stream_score import ScoreOptions, check_output, score
    from sepllm_train.evaluation.stream_text import TokenStream, check_text

    how = ScoreOptions(arguments.tokens, arguments.chunk, arguments.every, arguments.save_every)
    how.check()
    check_output(arguments.output)
    # Before the model, which takes long to load.
    check_text(arguments.text)
    opened, cache, options = _open(arguments)
    text = TokenStream(arguments.text, opened.tokenizer, unwrap=arguments.unwrap, repeat=arguments.repeat)
    score(opened, cache, options, text, how, arguments.output)


def _run_chat(arguments: argparse.Namespace) -> None:
    from sepllm_train.evaluation.stream_chat import chat
    from sepllm_train.generation.sampling import Sampling

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    if arguments.tokens < 1:
        raise UserError(f"--tokens={arguments.tokens} must be at least 1.")
    opened, cache, options = _open(arguments)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    chat(opened, cache, options.cache, sampling, arguments.tokens, sys.stdin)


def _run_report(arguments: argparse.Namespace) -> None:
    from sepllm_train.base.files import write_whole
    from sepllm_train.evaluation.stream_report import report

    table = report(arguments.folders, arguments.at)
    if arguments.output is None:
        print(table, end="")
    else:
        write_whole(arguments.output, table.encode())

"""The command line of generation."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sepllm_train.base.console import note
from sepllm_train.base.errors import UserError, exit_on_user_error

if TYPE_CHECKING:
    from sepllm_train.distributed.launch import Launch
    from sepllm_train.generation.choice import ResolvedCache
    from sepllm_train.generation.generate import Continuation

_EXAMPLES = """examples:
  generate.py runs/NAME --prompt "Once upon a time" --tokens 200
  torchrun --nproc-per-node=2 generate.py runs/NAME --tensor 2 --prompt-file prompts.txt --temperature 0.8 --seed 1
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of scripts/generate.py. Ends the process with 2 after one sentence on a user's mistake."""
    arguments = _parser().parse_args(argv)
    try:
        exit_on_user_error(lambda: _run(arguments))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description="Continues prompts with a run's model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run_folder", type=Path, metavar="RUN", help="folder of a trained run, such as runs/NAME")
    add("--checkpoint", type=int, metavar="STEP", help="step of the checkpoint (default: the newest)")
    add("--tokenizer", type=Path, metavar="FILE", help="the run's tokenizer, if it is not beside its data")
    add("--prompt", action="append", default=[], metavar="TEXT",
        help="text to continue; several make a batch; an empty one starts a document")  # fmt: skip
    add("--prompt-file", type=Path, metavar="FILE", help="prompts, one a line")
    add("--tokens", type=int, default=100, metavar="N", help="at most so many per prompt (100)")
    add("--no-stop-at-end-of-document", action="store_false", dest="stop", help="go on behind the end of a document")
    add("--json", action="store_true", help="one line of JSON per prompt")
    _add_sampling(parser.add_argument_group("sampling"))
    _add_cache(parser.add_argument_group("cache, sizes in tokens"))
    add("--tensor", type=int, default=1, metavar="N", help="processes that share the model, started by torchrun (1)")
    # Told apart from a mistyped option, since training has it.
    add("--pipeline", type=int, default=1, help=argparse.SUPPRESS)
    return parser


def _add_sampling(group: Any) -> None:
    either = group.add_mutually_exclusive_group()
    either.add_argument("--greedy", action="store_true", help="take the likeliest token (the default)")
    either.add_argument("--temperature", type=float, metavar="T", help="draw at random, the more the higher")
    group.add_argument("--top-k", type=int, metavar="K", help="only from the K likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="only from the likeliest ones of this probability")
    group.add_argument("--seed", type=int, default=0, help="the same seed draws the same (0)")


def _add_cache(group: Any) -> None:
    group.add_argument(
        "--cache",
        default="pattern",
        metavar="NAME",
        help="pattern: sees what training showed (default); sep, streaming: of bounded size; full: all keys",
    )
    group.add_argument("--initial", type=int, metavar="A", help="first tokens that stay (default: the run's)")
    group.add_argument("--separators", type=int, metavar="S", help="separators that stay (sep: 64)")
    group.add_argument("--window", type=int, metavar="W", help="last tokens that stay (default: the run's)")
    group.add_argument("--capacity", type=int, metavar="C", help="most keys (sep: 2(A + S + W), streaming: A + W)")
    group.add_argument(
        "--positions", choices=("training", "cache"), help="of keys: in the text, or in the cache (where bounded)"
    )


def _run(arguments: argparse.Namespace) -> None:
    """Check what is asked for, then generate. Raises UserError for whatever a user can mend."""
    # Imported late: torch and megatron-core take seconds, which --help should not cost.
    from sepllm_train.config.schema import require
    from sepllm_train.distributed.collectives import lost_rank
    from sepllm_train.distributed.launch import alone, launch_from_environment, process_grid
    from sepllm_train.generation.choice import CacheChoice
    from sepllm_train.generation.sampling import Sampling
    from sepllm_train.runs.open import config_for, read_config

    launch = launch_from_environment()
    texts = _prompts(arguments)
    require(arguments.tokens >= 1, f"--tokens {arguments.tokens} must be at least 1.")
    require(arguments.pipeline == 1, "generation has no pipeline parallelism: --tensor takes any run's checkpoints.")
    temperature = arguments.temperature
    if temperature is None:
        drawn = not arguments.greedy and (arguments.top_k is not None or arguments.top_p is not None)
        temperature = 1.0 if drawn else 0.0
    sampling = Sampling(temperature, arguments.top_k, arguments.top_p, arguments.seed)
    sizes = {name: getattr(arguments, name) for name in ("initial", "separators", "window", "capacity", "positions")}
    choice = CacheChoice(arguments.cache, **sizes)
    config = config_for(read_config(arguments.run_folder), arguments.tensor, launch.world_size)
    # A process alone takes its grid down also after a mistake; of several, one that failed must end at once.
    grid = alone(config) if launch.world_size == 1 else process_grid(config, launch)
    try:
        with grid as device:
            _generate(arguments, config, choice, sampling, texts, launch, device)
    except RuntimeError as error:
        raise lost_rank(error, config.parallel.timeout_seconds) or error from None


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """All prompts. Raises UserError when there is none, or the file cannot be read."""
    texts = list(arguments.prompt)
    if arguments.prompt_file is not None:
        try:
            lines = arguments.prompt_file.read_text(encoding="utf8").split("\n")
        except OSError as error:
            raise UserError(f"the prompts {arguments.prompt_file} cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise UserError(f"the prompts {arguments.prompt_file} are not UTF-8 text.") from None
        # The last line break ends a line and begins none.
        texts += lines[:-1] if lines[-1] == "" else lines
    if not texts:
        raise UserError("there is nothing to continue: give --prompt TEXT, or --prompt-file FILE with one a line.")
    return texts


def _generate(
    arguments: argparse.Namespace,
    config: Any,
    choice: Any,
    sampling: Any,
    texts: list[str],
    launch: Launch,
    device: Any,
) -> None:
    """Open the run inside the process grid, continue `texts` and tell the result."""
    from sepllm_train.distributed.collectives import on_all_ranks
    from sepllm_train.generation.generate import generate
    from sepllm_train.generation.native import NativeCache
    from sepllm_train.generation.sampling import TextStream
    from sepllm_train.runs.open import open_run

    run = on_all_ranks(lambda: open_run(arguments.run_folder, arguments.checkpoint, tokenizer=arguments.tokenizer))
    pattern, tokenizer = on_all_ranks(lambda: (run.token_pattern, run.tokenizer))
    try:
        chosen = choice.resolve(pattern, tokenizer)
    except ValueError as error:
        raise UserError(str(error)) from None
    # What a text goes on from, for want of a prompt, is the end of another document.
    prompts = [ids or [tokenizer.eod] for ids in tokenizer.encode_batch(texts)]
    note(chosen.line)
    _warn(chosen, max(map(len, prompts)) + arguments.tokens, config.data.sequence_length)
    model = run.load_model(config, device)
    cache = NativeCache(model, chosen.pattern, chosen.policies, len(prompts), positions=chosen.positions)

    live = launch.main and len(prompts) == 1 and not arguments.json
    end = tokenizer.eod if arguments.stop else None
    streams = [TextStream(tokenizer, prompt) for prompt in prompts]
    new = [""] * len(prompts)

    def told(row: int, text: str) -> None:
        new[row] += text
        if live:
            print(text, end="", flush=True)

    if live:
        print(texts[0], end="", flush=True)
    found = generate(
        cache,
        prompts,
        arguments.tokens,
        sampling,
        end=end,
        on_token=lambda row, token: told(row, "" if token == end else streams[row].add(token)),
    )
    for row, stream in enumerate(streams):
        told(row, stream.end())
    if live:
        print(flush=True)
    elif launch.main:
        lengths = [len(prompt) for prompt in prompts]
        for number, (text, length, more, one) in enumerate(zip(texts, lengths, new, found, strict=True), 1):
            record = json.dumps(_record(text, length, more, one), ensure_ascii=False)
            print(record if arguments.json else f"--- {number} of {len(texts)}\n{text}{more}", flush=True)
    total, seconds = sum(len(one.tokens) for one in found), max(one.seconds for one in found)
    mean = sum(one.cache_length for one in found) / len(found)
    note(f"{total:,} tokens in {seconds:.1f}s ({total / seconds:,.1f}/s), {mean:,.1f} keys in the cache on average")


def _warn(chosen: ResolvedCache, longest: int, trained: int) -> None:
    """Tell of positions beyond the `trained` ones; `longest`: tokens of the longest prompt with what is new."""
    if chosen.positions == "training":
        reach, what = longest, "prompt and new tokens are up to"
    else:
        reach, what = max(policy.capacity or 0 for policy in chosen.policies), "the cache holds up to"
    if reach > trained:
        note(f"warning: {what} {reach:,} tokens, beyond the {trained:,} that the model was trained on.")


def _record(text: str, prompt_tokens: int, new: str, one: Continuation) -> dict[str, Any]:
    """A prompt's line of JSON."""
    return {
        "prompt": text,
        "text": new,
        "prompt_tokens": prompt_tokens,
        "tokens": len(one.tokens),
        "ended": one.ended,
        "mean_cache_length": round(one.cache_length, 3),
        "tokens_per_second": round(len(one.tokens) / one.seconds, 3),
    }

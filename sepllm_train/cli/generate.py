"""sepllm generate: continue prompts with a run's own checkpoints, in one process or tensor parallel."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sepllm_train.base.console import note
from sepllm_train.base.errors import UserError
from sepllm_train.cli import flags
from sepllm_train.config.schema import require
from sepllm_train.generation.sampling import Sampling

if TYPE_CHECKING:
    from sepllm_train.distributed.launch import Launch
    from sepllm_train.generation.choice import ResolvedCache
    from sepllm_train.generation.generate import Continuation


def main(words: Sequence[str]) -> None:
    """Check what is asked for, then generate. Raises UserError for whatever a user can mend."""
    _generate_with(_parser().parse_args(words))


def _parser() -> argparse.ArgumentParser:
    parser = flags.parser(
        "generate",
        "Continue prompts with a run's model.",
        'runs/NAME --prompt "Once upon a time" --tokens 200\n'
        "runs/NAME --prompt-file prompts.txt --cache sep --temperature 0.8 --top-p 0.95 --seed 1",
    )
    launcher = "python -m sepllm_train.distributed.torchrun --nproc-per-node=2"
    parser.epilog = f"{parser.epilog}\n  {launcher} -m sepllm_train generate runs/NAME --tensor 2 ..."
    flags.add_run(parser)
    add = parser.add_argument
    add("--tokenizer", type=Path, metavar="FILE", help="the run's tokenizer, if it is not beside its data")
    add("--prompt", action="append", default=[], metavar="TEXT",
        help="text to continue; several make a batch; an empty one starts a document")  # fmt: skip
    add("--prompt-file", type=Path, metavar="FILE", help="prompts, one a line")
    add("--tokens", type=int, default=100, metavar="N", help="at most so many per prompt (100)")
    add("--no-stop-at-end-of-document", action="store_false", dest="stop", help="go on behind the end of a document")
    add("--json", action="store_true", help="one line of JSON per prompt")
    flags.add_sampling(parser.add_argument_group("sampling"))
    flags.add_attention(parser.add_argument_group("cache, sizes in tokens"), "cache", "pattern")
    add("--tensor", type=int, default=1, metavar="N", help="processes that share the model, started by torchrun (1)")
    # Told apart from a mistyped option, since training has it.
    add("--pipeline", type=int, default=1, help=argparse.SUPPRESS)
    return parser


def _generate_with(arguments: argparse.Namespace) -> None:
    texts = _prompts(arguments)
    flags.at_least(arguments, 1, "tokens")
    require(arguments.pipeline == 1, "generation has no pipeline parallelism: --tensor takes any run's checkpoints.")
    sampling = Sampling(flags.temperature(arguments), arguments.top_k, arguments.top_p, arguments.seed)
    choice = flags.choice(arguments, "cache")
    flags.require_run(arguments.run_folder, arguments.checkpoint)
    flags.require_tokenizer(arguments.tokenizer)

    # Imported late: torch and megatron-core take seconds, which a mistake should not cost.
    from sepllm_train.distributed.collectives import lost_rank
    from sepllm_train.distributed.launch import alone, launch_from_environment, process_grid
    from sepllm_train.runs.open import config_for, read_config

    launch = launch_from_environment()
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

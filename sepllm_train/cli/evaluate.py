"""sepllm evaluate: the paper's tasks, the share of keys that prompts keep, tables of results."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sepllm_train.base.errors import UserError
from sepllm_train.cli import flags
from sepllm_train.evaluation.options import PAPER_INTERVAL, EvaluationOptions, NeedleOptions, with_baselines
from sepllm_train.generation.choice import ATTENTIONS, CLASSES, INITIAL, WINDOW, check_used

_KEPT = """Counted: a prompt is eight examples, `Q: question`, newline, `A: answer`, blank line each (those of
chain-of-thought prompting, gsm8k/cot_8shot.jsonl), then `Q: question`, newline, `A:` for a test question. Its last
token keeps the --initial first tokens, the --window last ones, itself among them, and all separators between. The
share is the sum of the tokens kept over the sum of all, over all test prompts; the mean over the prompts of each one's
own share is told beside it. Separators are the tokenizer's entries of --classes (paper: those that are exactly one of
. , ? ! ; : space, tab, newline). No token is put before the prompt."""


def main(words: Sequence[str]) -> None:
    """Evaluate a model, or run the sub-command `kv`, `needles` or `report`. Raises UserError."""
    other = {"kv": _kv, "needles": _needles, "report": _report}.get(words[0]) if words else None
    if other is not None:
        other(words[1:])
    else:
        _evaluate(words)


def _evaluate(words: Sequence[str]) -> None:
    parser = flags.parser(
        "evaluate",
        "Tasks of lm-evaluation-harness, the paper's among them, under separator attention and baselines.\n"
        "`sepllm evaluate kv` counts the keys that prompts keep, without a model; `sepllm evaluate needles` writes\n"
        "RULER's needle tasks to a file; `sepllm evaluate report` makes a table of results.",
        "runs/pythia160m_sep --tasks lambada,piqa --data-dir data/eval --baselines paper\n"
        "models/pythia-160m --tasks gsm8k_cot --attention cache --window 256 --capacity 800",
    )
    flags.add_model(parser)
    add = parser.add_argument
    add("--tasks", type=flags.names, required=True, metavar="LIST", help="such as arc_challenge,arc_easy,"
        "lambada,logiqa,piqa,sciq,wikitext,gsm8k_cot,mmlu (the paper's), niah_single_1 (needles), or any other task, "
        "group or tag of lm-evaluation-harness")  # fmt: skip
    add("--data-dir", type=Path, metavar="DIR", help="local files (default: the Hugging Face hub)")
    add("--limit", type=int, metavar="N", help="only the first N documents of each task")
    add(
        "--num-fewshot", type=int, metavar="N", help="examples in a prompt (default: the task's own number, 5 for mmlu)"
    )
    add("--truncate", action="store_true", help="cut prompts that do not fit the model on the left")
    add("--output", type=Path, metavar="DIR", help="write a result for each task and attention")
    add("--overwrite", action="store_true", help="replace results in --output that are of another model,"
        " attention or other conditions")  # fmt: skip
    add("--batch-size", type=int, default=8, metavar="N", help="sequences in a forward (8)")
    _add_needles(parser.add_argument_group("needles (tasks niah_...)"), "the model's context, at most 4096")
    group = parser.add_argument_group("attention")
    flags.add_attention(group, "attention", "pattern")
    group.add_argument("--baselines", type=flags.names, default=[], metavar="LIST", help="others to evaluate, each at"
                       " the same cost: paper (dense, streaming, and fixed of --interval or of"
                       f" {PAPER_INTERVAL}), or such as dense,streaming:window=380,fixed:interval=4,"
                       "pattern:classes=comma+period")  # fmt: skip
    arguments = parser.parse_args(words)

    from sepllm_train.evaluation.hub import offline_unless_reachable
    from sepllm_train.evaluation.needles import KINDS
    from sepllm_train.evaluation.tasks import check_data, check_names

    check_names(arguments.tasks)
    if not arguments.tasks:
        raise UserError("--tasks names no task.")
    choices = with_baselines(flags.choice(arguments, "attention"), arguments.baselines)
    check_used(choices, flags.settings(arguments), ATTENTIONS)
    for one in choices:
        one.check()
    options = EvaluationOptions(
        tuple(arguments.tasks),
        arguments.data_dir,
        arguments.limit,
        arguments.num_fewshot,
        arguments.batch_size,
        arguments.truncate,
        _needle_options(arguments),
    )
    options.check()
    for option in ("lengths", "haystack"):
        if getattr(arguments, option) is not None and not KINDS.keys() & set(options.tasks):
            raise UserError(f"--{option} is for needles, and --tasks names none of {', '.join(KINDS)}.")
    if arguments.data_dir is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        check_data(arguments.tasks, arguments.data_dir)
    flags.require_model(arguments)
    given = options.needles.haystack is not None
    if any(name not in KINDS or (KINDS[name].haystack == "text" and not given) for name in options.tasks):
        offline_unless_reachable()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    device = flags.prepare_device(arguments)

    from sepllm_train.evaluation.attention import bind
    from sepllm_train.evaluation.report import table
    from sepllm_train.evaluation.run import evaluate, tokenizer_for
    from sepllm_train.evaluation.stream_model import open_model

    opened = open_model(arguments.model, arguments.tokenizer, arguments.dtype, device)
    attentions = [bind(opened, one) for one in choices]
    tokenizer = tokenizer_for(opened, arguments.tokenizer)
    results = evaluate(opened, tokenizer, attentions, options, arguments.output, arguments.overwrite)
    if results:
        print("\n" + table(results), end="")


def _add_needles(group: flags.Group, lengths: str) -> None:
    """--lengths, --count, --seed, --haystack."""
    add = group.add_argument
    add(
        "--lengths", type=flags.numbers, metavar="LIST", help=f"tokens of a prompt with its answer (default: {lengths})"
    )
    add("--count", type=int, default=NeedleOptions.count, metavar="N", help="records of each length (%(default)s)")
    add("--seed", type=int, default=NeedleOptions.seed, help="the same seed makes the same records (%(default)s)")
    add("--haystack", type=Path, metavar="FILE", help="text that needles are hidden in, where the task has none")


def _needle_options(arguments: argparse.Namespace) -> NeedleOptions:
    lengths = None if arguments.lengths is None else tuple(arguments.lengths)
    return NeedleOptions(lengths, arguments.count, arguments.seed, arguments.haystack)


def _needles(words: Sequence[str]) -> None:
    """Write records of RULER's needle tasks."""
    from sepllm_train.evaluation.needles import KINDS

    parser = flags.parser(
        "evaluate needles",
        "RULER's needle tasks for a tokenizer, a JSON record on each line, made without a network. `sepllm evaluate\n"
        "MODEL --tasks niah_single_1,...` makes and scores the same records.",
        "--tokenizer tokenizer.json --lengths 1024,4096 --kinds niah_single_1,niah_single_2 --haystack book.txt "
        "--output needles.jsonl",
    )
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="tokenizer.json or .model")
    parser.add_argument("--kinds", type=flags.names, default=["niah_single_1"], metavar="LIST", help=", ".join(KINDS))
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="a .jsonl file, which must not be there"
    )
    _add_needles(parser, "4096")
    arguments = parser.parse_args(words)
    if not arguments.kinds or len(set(arguments.kinds)) < len(arguments.kinds):
        raise UserError("--kinds must name at least one task, and each once.")
    options = _needle_options(arguments)
    options.check()
    flags.require_new(arguments.output)

    import json

    from data_prep.tokenizers import load_tokenizer
    from sepllm_train.base.files import write_whole
    from sepllm_train.evaluation.needle_tasks import LONGEST, needle_records
    from sepllm_train.evaluation.tasks import read_text

    tokenizer = load_tokenizer(arguments.tokenizer)
    text = None if options.haystack is None else read_text(options.haystack)
    lines = [
        json.dumps({"task": kind, **record})
        for kind in arguments.kinds
        for record in needle_records(
            lambda prompt: tokenizer.encode_batch([prompt])[0], kind, options.lengths or (LONGEST,), options, text
        )
    ]
    write_whole(arguments.output, ("\n".join(lines) + "\n").encode())
    print(f"{len(lines):,} records: {arguments.output}")


def _kv(words: Sequence[str]) -> None:
    """Print the share of keys that the last tokens of GSM8K's prompts keep."""
    parser = flags.parser(
        "evaluate kv",
        "Keys that the last token of a GSM8K prompt keeps, over all keys: the paper's runtime KV, without a model.",
    )
    parser.epilog = _KEPT
    parser.add_argument("--task", choices=("gsm8k_cot",), default="gsm8k_cot")
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR", help="with gsm8k/cot_8shot.jsonl and"
                        " gsm8k/test.jsonl")  # fmt: skip
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="tokenizer.json or .model")
    flags.add_settings(parser, ("initial", "window", "classes", "interval"))
    parser.set_defaults(initial=INITIAL, window=WINDOW, classes=CLASSES)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    arguments = parser.parse_args(words)
    flags.at_least(arguments, 1, "window", "interval", "limit")
    flags.at_least(arguments, 0, "initial")

    from data_prep.tokenizers import load_tokenizer
    from sepllm_train.evaluation.kv_share import gsm8k_prompts, kept_share, separators_of

    tokenizer = load_tokenizer(arguments.tokenizer)
    prompts = gsm8k_prompts(arguments.data_dir)[: arguments.limit]
    separators = separators_of(tokenizer, arguments.classes)
    found = kept_share(
        tokenizer.encode_batch(prompts), separators, arguments.window, arguments.initial, arguments.interval
    )
    what = f"every {arguments.interval}th token" if arguments.interval else f"{len(separators)} separator tokens"
    print(
        f"{found.share:.4f} of the keys kept at the last token of {found.prompts:,} prompts of {found.tokens:,.1f} "
        f"tokens (mean of the prompts' shares {found.mean:.4f}): initial {arguments.initial}, window "
        f"{arguments.window}, {what}"
    )


def _report(words: Sequence[str]) -> None:
    """Print the paper's tables from results, or a table of results at equal memory."""
    parser = flags.parser(
        "evaluate report",
        "The paper's tables from results of `sepllm evaluate`; or, from those of benchmarks/equal_memory, loss and\n"
        "needles by the keys that are kept, with a figure beside --output.",
        "evaluation/dense evaluation/sep --output evaluation/table.md",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="outputs of `sepllm evaluate`; a model each"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there (default: print it)")
    arguments = parser.parse_args(words)

    if arguments.output is not None and arguments.output.suffix == ".svg":
        raise UserError(f"--output {arguments.output} is the table's: name it .md, and a figure goes beside it.")

    from sepllm_train.base.files import write_whole
    from sepllm_train.evaluation.report import read_results, table
    from sepllm_train.evaluation.results import holds_memories

    if any(map(holds_memories, arguments.folders)):
        from sepllm_train.evaluation.memory_report import memory_figure, memory_table, read_memories

        memories = read_memories(arguments.folders)
        made = memory_table(memories)
        if arguments.output is not None:
            from sepllm_train.base.figures import svg

            write_whole(arguments.output.with_suffix(".svg"), svg(memory_figure(memories)).encode())
    else:
        made = table([result for folder in arguments.folders for result in read_results(folder)])
    if arguments.output is None:
        print(made, end="")
    else:
        write_whole(arguments.output, made.encode())

"""Keys that the last token of a GSM8K prompt keeps, over all keys so far: the paper's runtime KV, without a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.tokenizers import Tokenizer, load_tokenizer
from sepllm_train.base.errors import UserError, exit_on_user_error

_COUNTED = """Counted: a prompt is eight examples, `Q: question`, newline, `A: answer`, blank line each (those of
chain-of-thought prompting, gsm8k/cot_8shot.jsonl), then `Q: question`, newline, `A:` for a test question. Its last
token keeps the --initial first tokens, the --window last ones, itself among them, and all separators between. The
share is the sum of the tokens kept over the sum of all, over all test prompts; the mean over the prompts of each one's
own share is told beside it. Separators are the tokenizer's entries of --classes (paper: those that are exactly one of
. , ? ! ; : space, tab, newline). No token is put before the prompt."""


@dataclass(frozen=True)
class KeptShare:
    """share: tokens kept over all tokens, sums over the prompts; mean: of the prompts' own shares; tokens: mean length
    of a prompt."""

    share: float
    mean: float
    prompts: int
    tokens: float


def main(argv: Sequence[str] | None = None) -> None:
    """Print the shares; ends the process with code 2 and one sentence on a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="kv_share.py", description=__doc__, epilog=_COUNTED, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=("gsm8k_cot",), default="gsm8k_cot")
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR", help="with gsm8k/cot_8shot.jsonl and"
                        " gsm8k/test.jsonl")  # fmt: skip
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="tokenizer.json or .model")
    parser.add_argument("--window", type=int, default=256, metavar="N", help="last tokens, the newest included (256)")
    parser.add_argument("--initial", type=int, default=3, metavar="A", help="first tokens (3)")
    parser.add_argument("--classes", default="paper", metavar="NAMES", help="separator classes, or none (paper)")
    parser.add_argument("--interval", type=int, metavar="D", help="every D-th token in the place of separators")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    arguments = parser.parse_args(argv)
    exit_on_user_error(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    for name, least in (("window", 1), ("initial", 0), ("interval", 1), ("limit", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value} must be at least {least}.")
    tokenizer = load_tokenizer(arguments.tokenizer)
    prompts = gsm8k_prompts(arguments.data_dir)[: arguments.limit]
    separators = _separators(tokenizer, arguments.classes)
    found = kept_share(
        tokenizer.encode_batch(prompts), separators, arguments.window, arguments.initial, arguments.interval
    )
    what = f"every {arguments.interval}th token" if arguments.interval else f"{len(separators)} separator tokens"
    print(
        f"{found.share:.4f} of the keys kept at the last token of {found.prompts:,} prompts of {found.tokens:,.1f} "
        f"tokens (mean of the prompts' shares {found.mean:.4f}): initial {arguments.initial}, window "
        f"{arguments.window}, {what}"
    )


def gsm8k_prompts(data_dir: Path) -> list[str]:
    """The prompts of all test questions. Raises UserError for files that are missing or not in their form."""
    from sepllm_train.evaluation.tasks import local_files, read_records, same

    test = local_files("gsm8k_cot", data_dir)["test"]
    examples = test.with_name("cot_8shot.jsonl")
    if not examples.is_file():
        raise UserError(f"gsm8k_cot needs {examples}, and it is not there.")
    shots = read_records(examples, {"question": str, "target": str}, same)
    questions = read_records(test, {"question": str}, same)
    before = "".join(f"Q: {shot['question']}\nA: {shot['target']}\n\n" for shot in shots)
    return [f"{before}Q: {record['question']}\nA:" for record in questions]


def kept_share(
    prompts: Sequence[Sequence[int]], separators: Sequence[int], window: int, initial: int, interval: int | None = None
) -> KeptShare:
    """What the last tokens keep. interval: every interval-th token of a prompt in the place of `separators`."""
    kept = np.zeros(len(prompts))
    lengths = np.array([len(prompt) for prompt in prompts])
    for number, prompt in enumerate(prompts):
        position = np.arange(len(prompt))
        far = np.isin(prompt, separators) if interval is None else position % interval == 0
        kept[number] = np.sum((position < initial) | far | (position >= len(prompt) - window))
    return KeptShare(kept.sum() / lengths.sum(), float(np.mean(kept / lengths)), len(prompts), float(lengths.mean()))


def _separators(tokenizer: Tokenizer, classes: str) -> list[int]:
    from sepllm_train.generation.pattern import separator_ids

    if classes == "none":
        return []
    try:
        return separator_ids(tokenizer, classes)
    except ValueError as error:
        raise UserError(str(error)) from None

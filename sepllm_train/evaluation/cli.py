"""The command line of scripts/evaluate.py."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sepllm_train.base.errors import UserError, exit_on_user_error
from sepllm_train.evaluation.options import PAPER_INTERVAL, USES, AttentionOptions, check_used, with_baselines

# What the extra `eval` brings, by the names under which it is imported.
_NEEDED = {"lm_eval": "eval", "datasets": "eval", "accelerate": "eval", "transformers": "hf", "safetensors": "hf"}
_SETTINGS = ("initial", "window", "classes", "interval", "separators", "capacity", "positions")
_POSITIONS = ("cache", "training", "absolute")


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate; ends the process with code 2 and one sentence on a user's mistake."""
    arguments = parser().parse_args(argv)
    exit_on_user_error(lambda: needing_extras(lambda: _run(arguments)))


def needing_extras(program: Callable[[], None]) -> None:
    """Call `program`; a package that is not installed becomes a UserError that says how to install it."""
    try:
        program()
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        extra = _NEEDED.get(package)
        if extra is None:
            raise
        raise UserError(f"{package} is not installed: pip install -e '.[{extra}]' in the checkout.") from None


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="evaluate.py", description="The paper's tasks through lm-evaluation-harness, under separator attention."
    )
    made.add_argument("model", metavar="RUN_OR_MODEL", help="a run of ours, or a folder of a transformers model")
    made.add_argument("--tasks", type=_names, required=True, metavar="LIST", help="arc_challenge,arc_easy,lambada,"
                      "logiqa,piqa,sciq,wikitext,gsm8k_cot,mmlu or some of them")  # fmt: skip
    made.add_argument("--data-dir", type=Path, metavar="DIR", help="local files (default: the Hugging Face hub)")
    made.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    made.add_argument("--num-fewshot", type=int, metavar="N", help="examples in a prompt (default: the task's own"
                      " number, 5 for mmlu)")  # fmt: skip
    made.add_argument("--truncate", action="store_true", help="cut prompts that do not fit the model on the left")
    made.add_argument("--output", type=Path, metavar="DIR", help="write a result for each task and attention")
    made.add_argument("--overwrite", action="store_true", help="replace results in --output that are of another model,"
                      " attention or other conditions")  # fmt: skip
    made.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json or .model (default: the model's own)")
    made.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    made.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu); under torchrun cuda is each rank's")
    made.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    made.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences in a forward (8)")
    _add_attention(made)
    return made


def _add_attention(made: argparse.ArgumentParser) -> None:
    how = made.add_argument_group("attention")
    how.add_argument("--attention", choices=tuple(USES), default="pattern", help="what tokens see (pattern: that of"
                     " training, or the paper's for a model with full attention)")  # fmt: skip
    how.add_argument("--baselines", type=_names, default=[], metavar="LIST", help="others to evaluate,"
                     " each at the same cost: paper (dense, streaming, and fixed of --interval or of"
                     f" {PAPER_INTERVAL}), or such as dense,streaming:window=380,fixed:interval=4,"
                     "pattern:classes=comma+period")  # fmt: skip
    how.add_argument("--initial", type=int, metavar="A", help="first tokens (default: of training, or 3)")
    how.add_argument("--window", type=int, metavar="N", help="neighbours, the token included (of training, or 256)")
    how.add_argument("--classes", metavar="NAMES", help="separator classes (of training, or paper)")
    how.add_argument("--interval", type=int, metavar="D", help="fixed: every D-th token in place of separators")
    how.add_argument("--separators", type=int, metavar="S", help="cache: separators that stay (64)")
    how.add_argument("--capacity", type=int, metavar="C", help="cache: keys at which others are dropped")
    how.add_argument("--positions", choices=_POSITIONS, help="cache: places in it (default), or in the text")


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _run(arguments: argparse.Namespace) -> None:
    from sepllm_train.evaluation.tasks import check_names, local_files

    check_names(arguments.tasks)
    if not arguments.tasks:
        raise UserError("--tasks names no task.")
    if arguments.data_dir is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    import torch

    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {arguments.device}: there is no GPU here; use cpu.")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = arguments.device
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"

    from sepllm_train.evaluation.attention import bind
    from sepllm_train.evaluation.report import table
    from sepllm_train.evaluation.run import EvaluationOptions, evaluate, tokenizer_for
    from sepllm_train.evaluation.stream_model import open_model

    options = EvaluationOptions(
        tuple(arguments.tasks),
        arguments.data_dir,
        arguments.limit,
        arguments.num_fewshot,
        arguments.batch_size,
        arguments.truncate,
    )
    options.check()
    given = {key: getattr(arguments, key) for key in _SETTINGS if getattr(arguments, key) is not None}
    every = with_baselines(AttentionOptions(arguments.attention, **given), arguments.baselines)
    check_used(every, given)
    if arguments.data_dir is not None:
        for name in arguments.tasks:
            local_files(name, arguments.data_dir)
    opened = open_model(arguments.model, arguments.tokenizer, arguments.dtype, device)
    attentions = [bind(opened, one) for one in every]
    tokenizer = tokenizer_for(opened, arguments.tokenizer)
    results = evaluate(opened, tokenizer, attentions, options, arguments.output, arguments.overwrite)
    if results:
        print("\n" + table(results), end="")

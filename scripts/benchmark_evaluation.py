"""Seconds of an evaluation with the pattern beside one with full attention, taking turns in one process.

python scripts/benchmark_evaluation.py runs/pythia160m_sep --task lambada --data-dir data/eval --limit 512

Each turn is a whole evaluation: prompts, tokens, forwards, metrics, and counting the keys that were seen. Where others
use the processor too, the ratio of the processor's seconds tells more than that of the clock's.
"""

from __future__ import annotations

import check_environment  # noqa: F401

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError, exit_on_user_error
from sepllm_train.base.files import write_whole
from sepllm_train.generation.choice import AttentionChoice

BAR = 1.05


def main() -> None:
    """Print the median seconds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="RUN_OR_MODEL")
    parser.add_argument("--task", default="lambada")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="local files (default: the Hugging Face hub)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples in a prompt")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences in a forward (8)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each (5), after one to warm up")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--tokenizer", metavar="FILE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures there as JSON")
    arguments = parser.parse_args()
    exit_on_user_error(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")
    if arguments.data_dir is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds} must be at least 1.")
    figures = measure(arguments)
    if arguments.output is not None:
        write_whole(arguments.output, (json.dumps(figures, indent=1) + "\n").encode())


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures; says them."""
    import torch

    from sepllm_train.evaluation.attention import bind
    from sepllm_train.evaluation.harness import SeparatorLM
    from sepllm_train.evaluation.run import EvaluationOptions, calm, evaluate_task, tokenizer_for
    from sepllm_train.evaluation.stream_model import open_model
    from sepllm_train.evaluation.tasks import load_tasks
    from sepllm_train.training.run_folder import environment

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    options = EvaluationOptions(
        (arguments.task,), arguments.data_dir, arguments.limit, arguments.num_fewshot, arguments.batch_size
    )
    options.check()
    calm()
    opened = open_model(arguments.model, arguments.tokenizer, arguments.dtype, arguments.device)
    sides = {name: bind(opened, AttentionChoice(name)) for name in ("dense", "pattern")}
    lm = SeparatorLM(opened.model, tokenizer_for(opened, arguments.tokenizer), batch_size=options.batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    shares: dict[str, float] = {}
    with load_tasks([arguments.task], options.data_dir, options.shots) as (task,):
        for turn in range(arguments.rounds + 1):
            for name, attention in sides.items():
                begun = time.process_time()
                result = evaluate_task(lm, task, attention, options)
                assert result is not None
                shares[name] = result["attended_share"]
                if turn:
                    seconds[name].append(result["seconds"])
                    processor[name].append(time.process_time() - begun)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    ratio = medians["pattern"] / medians["dense"]
    on_processor = statistics.median(processor["pattern"]) / statistics.median(processor["dense"])
    for name, median in medians.items():
        say(f"{name}: {median:.2f} s, median of {arguments.rounds}, {shares[name]:.1%} attended")
    verdict = "met" if ratio <= BAR else "missed"
    say(f"pattern over dense: {ratio:.3f}x (bar {BAR}x: {verdict}), in seconds of the processor {on_processor:.3f}x")
    return {
        "command": sys.argv,
        "seconds": seconds,
        "median_seconds": medians,
        "ratio": ratio,
        "processor_seconds": processor,
        "processor_ratio": on_processor,
        "attended_share": shares,
        "environment": environment(),
    }


if __name__ == "__main__":
    main()

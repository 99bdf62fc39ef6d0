"""Seconds of an evaluation with the pattern beside one with full attention, interleaved in one process.

python -m benchmarks.evaluation runs/pythia160m_sep --task lambada --data-dir data/eval --limit 512

A round is a whole evaluation of each: prompts, tokens, forwards, metrics, and counting the visible keys. Where others
use the processor too, the ratio of CPU seconds is more reliable than that of wall-clock seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import check_positive, exit_with, interleaved, write_json
from sepllm_train.base.console import say
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
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds (5), after one to warm up")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--tokenizer", metavar="FILE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures there as JSON")
    arguments = parser.parse_args()
    _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")
    if arguments.data_dir is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    check_positive(arguments, "rounds")
    figures = measure(arguments)
    if arguments.output is not None:
        write_json(arguments.output, figures)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures, which are printed too."""
    import torch

    from sepllm_train.evaluation.attention import bind
    from sepllm_train.evaluation.harness import SeparatorLM
    from sepllm_train.evaluation.loading import load_tasks
    from sepllm_train.evaluation.run import EvaluationOptions, calm, evaluate_task, tokenizer_for
    from sepllm_train.evaluation.stream_model import open_model
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
    with load_tasks([arguments.task], options.data_dir, options.shots) as (task,):

        def evaluate(attention: Any) -> dict[str, Any]:
            begin = time.process_time()
            result = evaluate_task(lm, task, attention, options)
            assert result is not None
            return {**result, "processor": time.process_time() - begin}

        calls = {name: partial(evaluate, attention) for name, attention in sides.items()}
        results = interleaved(calls, arguments.rounds)
    seconds = {name: [result["seconds"] for result in found] for name, found in results.items()}
    processor = {name: [result["processor"] for result in found] for name, found in results.items()}
    shares = {name: found[-1]["attended_share"] for name, found in results.items()}
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    ratio = medians["pattern"] / medians["dense"]
    on_processor = statistics.median(processor["pattern"]) / statistics.median(processor["dense"])
    for name, median in medians.items():
        say(f"{name}: {median:.2f} s, median of {arguments.rounds}, {shares[name]:.1%} attended")
    verdict = "met" if ratio <= BAR else "missed"
    say(f"pattern over dense: {ratio:.3f}x (bar {BAR}x: {verdict}), in CPU seconds {on_processor:.3f}x")
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
    exit_with(main)

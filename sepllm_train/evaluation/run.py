"""The evaluation: every task under every attention, one result each."""

from __future__ import annotations

import logging
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from importlib import metadata
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance

from data_prep.tokenizers import Tokenizer
from sepllm_train.base.console import duration, say
from sepllm_train.base.errors import UserError, first_line
from sepllm_train.base.files import write_json
from sepllm_train.evaluation.attention import Attention
from sepllm_train.evaluation.harness import SeparatorLM
from sepllm_train.evaluation.loading import RECORD_ERRORS, Loaded, load_tasks
from sepllm_train.evaluation.options import EvaluationOptions
from sepllm_train.evaluation.results import FORMAT, refuse_other, result_path
from sepllm_train.evaluation.stream_model import Opened
from sepllm_train.hf.tokenizer import to_transformers
from sepllm_train.training.run_folder import environment

# The harness's seeds: the same examples for every attention, and for every user.
SEED, EXAMPLES_SEED = 1234, 1234
# Resamples behind the standard errors that have no formula.
RESAMPLES = 1000
_PACKAGES = ("lm_eval", "transformers", "datasets", "tokenizers")


def tokenizer_for(opened: Opened, given: str | None) -> Any:
    """transformers' tokenizer of an opened model: the one in its folder, which may put a first token before every text,
    or one made of ours. Names of special tokens in a text are text to both, as in training. given: file named on the
    command line. Raises UserError when it cannot be made."""
    from transformers import AutoTokenizer

    folder = Path(opened.name)
    if given is None and (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    return to_transformers(opened.tokenizer)


def evaluate(
    opened: Opened,
    tokenizer: Any,
    attentions: Sequence[Attention],
    options: EvaluationOptions,
    output: Path | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate and say the results; gives them on rank 0, and writes each to the folder `output` as it is there.

    overwrite: also where `output` has a result of the same name and another model, attention, or other conditions.
    Raises UserError, before the first forward, for unknown tasks, bad task files, prompts that do not fit the model's
    context, and results that would be overwritten.
    """
    options.check()
    calm()
    labels = [attention.label for attention in attentions]
    if len(set(labels)) < len(labels):
        raise UserError(f"the attentions {', '.join(labels)} name one twice.")
    lm = SeparatorLM(
        opened.model,
        tokenizer,
        batch_size=options.batch_size,
        truncate=options.truncate,
        quiet=not sys.stderr.isatty(),
    )
    results = []
    for attention in attentions:
        say(str(attention) + "".join(f" | training-free: {told}" for told in attention.differences))
    identity = _identity(opened, opened.tokenizer)
    with load_tasks(options.tasks, options.data_dir, options.shots, lm, options.needles) as loaded:
        if output is not None and not overwrite:
            for task, attention in product(loaded, attentions):
                planned = identity | _planned(task, attention, options, lm.world_size)
                refuse_other(result_path(output, task.name, attention.label), planned)
        for number, task in enumerate(loaded):
            made = list(requests(lm, task, options))
            # The first task's own evaluation begins with this check, which takes time.
            if number and not options.truncate:
                lm.check(task.name, made)
        if output is not None:
            _make_folder(output)
        for task, attention in product(loaded, attentions):
            result = evaluate_task(lm, task, attention, options)
            if result is None:
                continue
            result |= identity
            say(line(result))
            results.append(result)
            if output is not None:
                path = result_path(output, task.name, attention.label)
                write_json(path, result)
    return results


def evaluate_task(
    lm: SeparatorLM, task: Loaded, attention: Attention, options: EvaluationOptions
) -> dict[str, Any] | None:
    """The result of one task under one attention; None on other ranks than 0."""
    from lm_eval.evaluator import evaluate as harness_evaluate

    lm.attend(attention)
    _seed(task)
    begun = time.monotonic()
    with redirect_stdout(StringIO()):  # it tells there that it resamples
        found = harness_evaluate(
            lm=lm, task_dict=task.tasks, limit=options.limit, bootstrap_iters=RESAMPLES, log_samples=False
        )
    seconds = time.monotonic() - begun
    shares, truncated = lm.gathered()
    if found is None:
        return None
    harness = task.harness
    return {
        "format": FORMAT,
        "task": task.name,
        "harness_task": harness,
        "harness_task_version": found["versions"].get(harness),
        "metrics": _metrics(found["results"][harness]),
        "subtasks": {name: _metrics(values) for name, values in found["results"].items() if name != harness},
        "documents": sum(counts["effective"] for counts in found["n-samples"].values()),
        "documents_there": sum(counts["original"] for counts in found["n-samples"].values()),
        "truncated_prompts": truncated,
        **_planned(task, attention, options, lm.world_size),
        **shares.summary(),
        "batch_size": options.batch_size,
        "seconds": seconds,
    }


def _planned(task: Loaded, attention: Attention, options: EvaluationOptions, ranks: int) -> dict[str, Any]:
    """Conditions of a result that are settled before it is measured."""
    return {
        "limit": options.limit,
        "num_fewshot": task.shots,
        "split": task.split,
        "data": task.data,
        "attention": attention.describe(),
        "ranks": ranks,
    }


def requests(lm: SeparatorLM, task: Loaded, options: EvaluationOptions) -> Iterator[Instance]:
    """The requests of this rank, as the harness will make them. Raises UserError for records that it cannot read."""
    _seed(task)
    for name, one in task.tasks["tasks"].items():
        try:
            one.build_all_requests(limit=options.limit, rank=lm.rank, world_size=lm.world_size)
            wrong = None if task.data["source"] == "hub" else _wrong_label(one)
        except RECORD_ERRORS as error:
            wrong = f"it has not what the task reads ({type(error).__name__}: {first_line(error)})"
        if wrong is not None:
            raise UserError(f"a record of {name} cannot be used, {wrong}: see {task.data['source']}.")
        yield from one.instances


def _wrong_label(task: Any) -> str | None:
    """Words on a label that is none of the choices of its record, which the harness scores as a wrong answer; None
    where there is none."""
    if task.OUTPUT_TYPE != "multiple_choice" or getattr(task, "multiple_input", 0):
        return None
    for request in task.instances:
        choices, target = task.doc_to_choice(request.doc), task.doc_to_target(request.doc)
        for one in target if isinstance(target, list) else [target]:
            if not (one in choices if isinstance(one, str) else 0 <= one < len(choices)):
                return f"its label {one!r} is none of its {len(choices)} choices"
    return None


def _seed(task: Loaded) -> None:
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for one in task.tasks["tasks"].values():
        one.set_fewshot_seed(seed=EXAMPLES_SEED)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be made: {error.strerror}.") from None


def line(result: dict[str, Any]) -> str:
    """One result in a line."""
    part = "" if result["limit"] is None else f" of {result['documents_there']:,}"
    return (
        f"{result['task']} | {result['attention']['label']} | {measured(result)} | "
        f"attended {_percent(result['attended_share'])} | KV kept {_percent(result['kv_share_prompt'])} at the "
        f"prompt's end, {_percent(result['kv_share'])} mean | {result['documents']:,}{part} documents, "
        f"{result['num_fewshot']} examples each, {duration(result['seconds'])}"
    )


def measured(result: dict[str, Any]) -> str:
    """Metrics of a result with their standard errors, in words."""
    return ", ".join(
        f"{name} {_rounded(entry['value'])}" + (f" ± {_rounded(entry['stderr'])}" if entry["stderr"] else "")
        for name, entry in result["metrics"].items()
    )


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """From the harness's {"acc,none": x, "acc_stderr,none": y} to {"acc": {"value": x, "stderr": y}}; the filter's name
    stays where there is one."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        name, _, chosen = key.partition(",")
        if chosen and not name.endswith("_stderr"):
            error = values.get(f"{name}_stderr,{chosen}")
            label = name if chosen == "none" else f"{name},{chosen}"
            found[label] = {"value": float(value), "stderr": float(error) if isinstance(error, float) else None}
    return found


def _identity(opened: Opened, tokenizer: Tokenizer) -> dict[str, Any]:
    """The model, packages and machine of a result."""
    return {
        "model": {
            "name": opened.name,
            "fingerprint": opened.fingerprint(),
            "class": type(opened.model).__name__,
            "parameters": sum(parameter.numel() for parameter in opened.model.parameters()),
            "dtype": str(opened.model.dtype).removeprefix("torch."),
            "tokenizer_sha256": tokenizer.sha256,
        },
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "environment": environment(),
    }


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _rounded(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"


def calm() -> None:
    """The harness tells what it does at length; processes for the resampling cost more than they save here."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")

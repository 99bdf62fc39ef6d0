"""Tasks that score a run while it trains, as `sepllm evaluate` scores its checkpoint of the same step."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tqdm

from sepllm_train.base.console import duration, fold, say
from sepllm_train.base.errors import UserError
from sepllm_train.evaluation.options import EvaluationOptions, in_keys
from sepllm_train.evaluation.results import conditions
from sepllm_train.training.live_run import LiveRun
from sepllm_train.training.prepare import Prepared

# Metrics whose names say by which filter an answer was taken have a comma in them, the keys of records a slash.
_FILTER, _PART = ",", "/"


class LiveTasks:
    """The tasks of evaluation.tasks, for training.evaluator. A context manager: their data is kept in its block.

    Each evaluation builds the model of transformers that `sepllm evaluate` makes of a checkpoint, in fp32 on the device
    of each rank, beside what is trained; each rank takes a part of the documents. The libraries are imported where the
    process is restored after it.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> LiveTasks:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def prepare(self, prepared: Prepared) -> str:
        """Load the tasks, and check their prompts against the tokenizer and the context of the model.

        Gives the console line of the start. Raises UserError as `sepllm evaluate` does, and for a model that
        transformers does not have.
        """
        asked = prepared.config.evaluation
        folder = None if asked.data_dir is None else Path(asked.data_dir)
        self.options = EvaluationOptions(
            tuple(asked.tasks), folder, asked.limit, asked.shots, asked.batch_size, asked.truncate
        )
        with undisturbed(offline=folder is not None), in_keys():
            documents = self._load(prepared)
        every = f"every {asked.interval:,} steps and " if asked.interval else ""
        return f"evaluation: {every}at the end, on a copy of the model in fp32 in every process | {documents}"

    def _load(self, prepared: Prepared) -> str:
        """Set tokenizer, model without weights and tasks; gives the tasks in words."""
        from sepllm_train.evaluation.harness import SeparatorLM
        from sepllm_train.evaluation.loading import load_tasks
        from sepllm_train.evaluation.run import calm, requests
        from sepllm_train.generation.pattern import TokenPattern
        from sepllm_train.hf.architecture import model_type
        from sepllm_train.hf.export import Shape
        from sepllm_train.hf.tokenizer import to_transformers
        from sepllm_train.runs.vocabulary import tokenizer_and_classes

        calm()
        config = prepared.config
        try:
            model_type(config)
        except UserError as error:
            raise UserError(f"evaluation.tasks scores the model as one of transformers, and {error}") from None
        self.tokenizer, classes = tokenizer_and_classes(prepared.entry.folder, config.data, prepared.identity, None)
        self.theirs = to_transformers(self.tokenizer)
        end = self.tokenizer.eod
        pattern = TokenPattern.of_run(prepared.steps.base, classes, end)
        self.shape = Shape(config, prepared.facts.vocabulary, pattern, end)
        options = self.options
        lm = SeparatorLM(self.shape.empty(), self.theirs, batch_size=options.batch_size, truncate=options.truncate)
        self.loaded = self._stack.enter_context(load_tasks(options.tasks, options.data_dir, options.shots, lm))
        found = []
        for task in self.loaded:
            lm.check(task.name, requests(lm, task, options))
            sizes = [len(one.eval_docs) for one in task.tasks["tasks"].values()]
            documents = sum(min(size, options.limit or size) for size in sizes)
            shots = f", {task.shots} examples each" if task.shots else ""
            found.append(f"{task.name}, {documents:,} documents{shots}")
        return " | ".join(found)

    def scores(self, run: LiveRun, stopped: Callable[[], bool]) -> dict[str, Any] | None:
        """Score the weights of `run` on every task, a console line each; gives the record of rank 0, {} elsewhere.

        None as soon as `stopped`, which the ranks call together before each task. Raises UserError, on every rank, for
        weights that are not finite.
        """
        with undisturbed(offline=self.options.data_dir is not None):
            try:
                return self._scores(run, stopped)
            finally:
                # Modules of transformers hold each other.
                gc.collect()
                if run.device.type == "cuda":
                    torch.cuda.empty_cache()

    def _scores(self, run: LiveRun, stopped: Callable[[], bool]) -> dict[str, Any] | None:
        from sepllm_train.evaluation.attention import bind
        from sepllm_train.evaluation.harness import SeparatorLM
        from sepllm_train.evaluation.run import calm, evaluate_task, measured
        from sepllm_train.evaluation.stream_model import Opened
        from sepllm_train.generation.choice import AttentionChoice

        calm()
        watchdog, when = run.guards.watchdog, f"at step {run.state.step}"
        watchdog.beat(f"collecting the weights {when}")
        model = self.shape.filled(run.weights(), torch.float32, run.folder).to(run.device)
        attention = bind(Opened(model, self.tokenizer, str(run.folder)), AttentionChoice("pattern"))
        lm = SeparatorLM(
            model,
            self.theirs,
            batch_size=self.options.batch_size,
            truncate=self.options.truncate,
            # Not a beat: ranks have different numbers of documents, and are compared by their beats.
            progress=lambda: watchdog.allow(0.0),
        )
        record: dict[str, Any] = {}
        for task in self.loaded:
            if stopped():
                return None
            watchdog.beat(f"the evaluation of {task.name} {when}")
            result = evaluate_task(lm, task, attention, self.options)
            if result is not None:
                say(fold(f"evaluation {when}: {task.name} {measured(result)}, {duration(result['seconds'])}"))
                record |= _figures(result)
                counted = {key: result[key] for key in ("documents", "truncated_prompts")}
                record.setdefault("evaluation", {})[task.name] = conditions(result) | counted
        return record


def _figures(result: dict[str, Any]) -> dict[str, float]:
    """Metrics of a result and their standard errors by the keys of metrics.jsonl: eval/TASK/METRIC."""
    found = {}
    for name, entry in result["metrics"].items():
        key = f"eval/{result['task']}/{name.replace(_FILTER, _PART)}"
        found[key] = entry["value"]
        if entry["stderr"] is not None:
            found[f"{key}_stderr"] = entry["stderr"]
    return found


@contextmanager
def undisturbed(*, offline: bool) -> Iterator[None]:
    """Leave RNG state, environment and settings of this process after the block as they were before it, whatever the
    evaluation's libraries do to them. offline: they do not look for anything on the hub."""
    states = random.getstate(), np.random.get_state()
    environment = dict(os.environ)
    threads, grad, dtype = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    bar = vars(tqdm.tqdm)["__init__"]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            if offline:
                os.environ.setdefault("HF_HUB_OFFLINE", "1")
            # The harness has bars that nothing else turns off.
            tqdm.tqdm.__init__ = partialmethod(bar, disable=True)
            yield
        finally:
            tqdm.tqdm.__init__ = bar
            # A tracker that starts meanwhile, in a thread of its own, keeps its variables.
            for name in os.environ.keys() - environment.keys():
                if not name.startswith("WANDB"):
                    del os.environ[name]
            os.environ.update(environment)
            torch.set_num_threads(threads)
            torch.set_grad_enabled(grad)
            torch.set_default_dtype(dtype)
            random.setstate(states[0])
            np.random.set_state(states[1])

"""Evaluation: scores of the model on tasks while it trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from sepllm_train.base.console import fold, say
from sepllm_train.base.errors import RankError, UserError
from sepllm_train.training.live_run import LiveRun
from sepllm_train.training.out_of_memory import is_out_of_memory
from sepllm_train.training.prepare import Prepared
from sepllm_train.training.step_logger import StepLogger

# In every record of an evaluation.
SECONDS = "eval/seconds"


class Tasks(Protocol):
    """Tasks that score a model: `evaluation.live`, which imports this package. Every rank calls the same."""

    def prepare(self, prepared: Prepared) -> str:
        """Check, before a model is built, that it can be scored; gives a console line. Raises UserError."""

    def scores(self, run: LiveRun, stopped: Callable[[], bool]) -> dict[str, Any] | None:
        """Score the model of a run, and leave the process as it was; gives what rank 0 records.

        None when `stopped`, which the ranks call together, was true before a task. Raises UserError.
        """


class Evaluator:
    """Evaluates a run on `tasks`, None for no evaluation. Every rank calls it at the same steps."""

    def __init__(self, run: LiveRun, logger: StepLogger, tasks: Tasks | None) -> None:
        self.run = run
        self.logger = logger
        self.tasks = tasks

    def due(self, step: int) -> bool:
        """True at the last step and, with evaluation.interval, at every so many steps."""
        interval, last = self.run.config.evaluation.interval, self.run.config.training.steps
        every = interval > 0 and step > 0 and step % interval == 0
        return self.tasks is not None and (every or step == last)

    def missing(self) -> bool:
        """True where an evaluation is due at this step and is not in metrics.jsonl."""
        return self.due(self.run.state.step) and not self.logger.has(SECONDS)

    def evaluate(self) -> bool:
        """Log the scores of all tasks; false when a rank is asked to stop before a task, and then nothing is logged.

        Its seconds are not those of training. A model that cannot be scored gives a warning. Raises RankError when one
        of several ranks cannot go on.
        """
        if self.tasks is None:
            return True
        self.logger.log()
        begin = time.perf_counter()
        try:
            record = self.tasks.scores(self.run, self._stopped)
        except (UserError, MemoryError, RuntimeError) as error:
            say(fold(f"warning: {self._reason(error)}: training continues without these scores"))
            return True
        seconds = time.perf_counter() - begin
        self.logger.began += seconds
        if record is None:
            return False
        self.logger.write({**record, SECONDS: seconds})
        return True

    def _reason(self, error: Exception) -> str:
        """The failure in words, where the run can go on; else raises."""
        memory = is_out_of_memory(error)
        if not memory and not isinstance(error, UserError):
            raise error
        step = self.run.state.step
        what = (
            f"out of memory for a copy of the model and evaluation.batch_size={self.run.config.evaluation.batch_size}"
            if memory
            else str(error).rstrip(".")
        )
        reason = f"the evaluation at step {step} failed ({what})"
        # The others wait for what this rank alone could not do.
        if dist.get_world_size() > 1 and (memory or isinstance(error, RankError)):
            raise RankError(
                f"{reason}: change the evaluation group, or leave it out with evaluation.tasks=[]; the same command "
                "continues from the newest checkpoint."
            ) from None
        return reason

    def _stopped(self) -> bool:
        """True when any rank is asked to stop."""
        asked = torch.tensor(float(self.run.guards.stop.name is not None), device=self.run.device)
        dist.all_reduce(asked)
        return bool(asked > 0)

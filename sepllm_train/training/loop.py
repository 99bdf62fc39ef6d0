"""The training loop: steps, and when they are followed by a log line, a validation or a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from sepllm_train.base.console import fold, say
from sepllm_train.base.errors import UserError
from sepllm_train.data.loader import Batch, MicroBatchSampler, micro_batches
from sepllm_train.training.checkpoint import Saver
from sepllm_train.training.console_lines import StepProgress
from sepllm_train.training.evaluator import Evaluator
from sepllm_train.training.live_run import LiveRun
from sepllm_train.training.profile import StepProfiler
from sepllm_train.training.step import StepResult
from sepllm_train.training.step_logger import StepLogger
from sepllm_train.training.update import BadStepDetector
from sepllm_train.training.validator import Validator


class Loop:
    """Trains a run from its state to the last step. Every rank runs it."""

    def __init__(
        self, run: LiveRun, saver: Saver, logger: StepLogger, validator: Validator, evaluator: Evaluator
    ) -> None:
        self.live = run
        self.saver = saver
        self.logger = logger
        self.validator = validator
        self.evaluator = evaluator
        self.detector = BadStepDetector(run.config.training, run.state)
        self.profiler = StepProfiler(run.config.logging, run.folder / "profile", dist.get_rank(), run.device)
        self.first_step = run.state.step
        # Whether the ranks have agreed to stop early, after the step that is done.
        self.stopping = False
        # Whether all steps are done, and the evaluation after them.
        self.complete = False

    def run(self, dataset: Dataset) -> None:
        """Train on `dataset` to training.steps, validating, evaluating and saving on the way and at the end.

        When any rank is asked to stop, the step is finished and saved, and that is the end: `complete` is false unless
        nothing was left to do.
        Raises UserError when a file of the data changes; nothing that was trained since the last look is saved then.
        Raises UserError when the run's folder is disturbed, after saving what can be.
        Raises BadSteps after training.max_bad_steps bad steps in a row, and in place of the last save when every step
        was bad or the last validation loss is not finite.
        """
        live, state, training = self.live, self.live.state, self.live.config.training
        iterators = [self._training_batches(dataset) for _ in live.training.chunks]
        self._agree_to_stop()
        if _due(state.step, training.validation_interval) and not self.stopping and not self.logger.has("val/loss"):
            self.validator.validate()
        if state.step < training.steps and not self.stopping:
            self.stopping = self.evaluator.missing() and not self.evaluator.evaluate()
        if state.step == 0 and training.listed(0) and not self.stopping:
            self.saver.save(state)
        progress = StepProgress(training.steps)
        while state.step < training.steps and not self.stopping:
            self.profiler.before(state.step + 1)
            result = self._step(iterators, progress)
            if compiled := live.guards.compilation.take():
                say(compiled)
            self._profiled()
            if result.bad is not None:
                self._skipped(result.bad, dataset)
            step, end = state.step, self.stopping or state.step == training.steps
            # An interval lies in one phase: its pairs are counted against one length, its steps have one batch.
            phase_ends = step == live.schedule.phase(step).last
            log = end or phase_ends or step % live.config.logging.interval == 0
            # Who stops a run may not leave it the time to validate: that is made up for when it continues.
            validate = step == training.steps or (_due(step, training.validation_interval) and not self.stopping)
            save = end or training.listed(step) or _due(step, training.checkpoint_interval)
            # The last one has time until the last checkpoint is written.
            evaluate = self.evaluator.due(step) and not end
            if log or validate or save or evaluate:
                live.guards.check_data()
                self.check_folder()
            if log:
                self.logger.log()
            if validate:
                self.validator.validate()
            if step == training.steps:
                failure = self.detector.failure_of_run(result.bad, self.validator.loss)
                if failure is not None:
                    raise failure
            if save:
                self._save()
            if evaluate and not self.evaluator.evaluate():
                # It is made up for when the run continues from this step.
                self.stopping = True
                if not save:
                    self._save()
            self.logger.checkpoints(self.saver.poll())
        self._finish_checkpoint()
        if state.step == training.steps:
            self.complete = not self.evaluator.missing() or (not self.stopping and self.evaluator.evaluate())

    def _training_batches(self, dataset: Dataset) -> Iterator[Batch]:
        """Micro-batches of this replica from the next step on."""
        live, training = self.live, self.live.config.training
        sampler = MicroBatchSampler(
            range(live.schedule.samples(live.state.step), live.facts.samples),
            micro_batch=training.micro_batch,
            replica=live.replica,
            replicas=live.facts.replicas,
        )
        return micro_batches(
            dataset,
            sampler,
            workers=live.config.data.workers,
            device=live.device,
            on_host=live.stepper.on_host,
            vocabulary=live.facts.vocabulary,
            lost=live.guards.worker_lost,
        )

    def _agree_to_stop(self) -> None:
        """Find out whether any rank was asked to stop before there was a step to finish."""
        asked = torch.tensor(self.live.guards.numbers(), dtype=torch.float64, device=self.live.device)
        dist.all_reduce(asked)
        self.stopping = bool(asked[0] > 0)

    def _step(self, iterators: list[Iterator[Batch]], progress: StepProgress) -> StepResult:
        """Take one optimizer step and add it to the interval."""
        live = self.live
        guards, stepper, schedule = live.guards, live.stepper, live.schedule
        number = live.state.step + 1
        phase = schedule.phase(number)
        micro_batches = live.facts.micro_batches(phase)

        def micro_batch(part: int) -> None:
            guards.watchdog.beat(f"step {number}, micro-batch {part}")
            progress.micro_batch(part)

        def own_numbers() -> list[float]:
            guards.watchdog.beat(f"the update of step {number}")
            return guards.numbers()

        begin = time.perf_counter()
        stepper.use(schedule.pattern(number), phase.length)
        stepper.clock.begin()
        progress.begin(number, micro_batches)
        result = stepper.train(iterators, micro_batches, micro_batch, judge=self.detector.judge, own=own_numbers)
        progress.end()
        self.logger.add(result, schedule.window(number) or 0)
        self.stopping = result.sums[0] > 0
        live.state.overflows += result.skipped
        # Nothing waits for the device here: the next step is prepared while it updates the weights.
        stepper.clock.end()
        self.logger.interval.seconds += time.perf_counter() - begin
        live.state.step += 1
        return result

    def _skipped(self, reason: str, dataset: Any) -> None:
        """Record the step that was just left out, and stop when there were too many in a row."""
        self.logger.bad_step(reason, dataset)
        if self.detector.exhausted:
            self.logger.log()
            raise self.detector.failure(self.live.state.step, reason)

    def _profiled(self) -> None:
        """Write the trace of logging.profile when its last step is done."""
        step = self.live.state.step
        self.live.guards.watchdog.beat(f"the profile up to step {step}")
        try:
            trace = self.profiler.after(step)
        except OSError as error:
            say(f"warning: the profile could not be written ({error.strerror}): training goes on")
            return
        if trace is not None:
            say(
                fold(
                    f"profile: {trace} | view it in chrome://tracing or ui.perfetto.dev | operators by time in the "
                    ".txt beside it"
                )
            )

    def _save(self) -> None:
        """Start a checkpoint of this step; it is written while training continues."""
        self.logger.log()
        self.live.guards.watchdog.beat(f"saving step {self.live.state.step}")
        self.saver.save(self.live.state)

    def check_folder(self) -> None:
        """Raise UserError on every rank when rank 0 sees that the run's folder was disturbed, after saving this step
        where that can be."""
        disturbed = self.live.guards.disturbed_folder()
        if disturbed is None:
            return
        step = self.live.state.step
        if not disturbed.usable:
            raise UserError(f"{disturbed.message}.")
        self.logger.log()
        self.live.guards.watchdog.beat(f"saving step {step}")
        self.saver.save(self.live.state, again=True)
        self._finish_checkpoint()
        raise UserError(
            f"{disturbed.message}; step {step} is saved in {self.live.folder}, and the same command continues from "
            "there."
        )

    def _finish_checkpoint(self) -> None:
        """Wait for the checkpoint in flight. Raises UserError when it could not be written."""
        self.live.guards.watchdog.beat("waiting for the last checkpoint")
        self.logger.checkpoints(self.saver.finish())
        self.logger.end()


def _due(step: int, interval: int) -> bool:
    """True when an event of every `interval` steps (0: only at the end) is due at `step`."""
    return interval > 0 and step % interval == 0

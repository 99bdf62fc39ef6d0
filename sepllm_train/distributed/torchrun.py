"""torchrun whose exit code is the workers' own: for batch systems, and for `sepllm pretrain --nproc N`.

    python -m sepllm_train.distributed.torchrun --nproc-per-node=8 scripts/pretrain.py +experiment=pythia160m_sep

torchrun itself ends with 1 whatever ended its workers, kills them 30 seconds after a SIGTERM, and prints a traceback
and a block of its own below the worker's message. But a batch script has to tell an interrupted run from a mistake, and
a large checkpoint takes longer than that. Options and everything else are torchrun's own.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from sepllm_train.base.errors import EXIT_BAD_STEPS, EXIT_INTERRUPTED, EXIT_LOST_RANK, EXIT_USER_ERROR
from sepllm_train.base.signals import STOPPING, decide, handled, heeded

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# A worker that ends with one of these has printed the reason.
TOLD_BY_WORKERS = (EXIT_USER_ERROR, EXIT_BAD_STEPS, EXIT_LOST_RANK, EXIT_INTERRUPTED)
# After these a restart would end the same, or is not wanted.
FINAL = (EXIT_USER_ERROR, EXIT_BAD_STEPS, EXIT_INTERRUPTED)
# Ends of workers that the forwarded signal brought about.
_STOPPED = (EXIT_INTERRUPTED, *(-number for number in STOPPING))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun with `arguments` (default: the command line) and give the exit code of the worker that failed first.

    Signals are left to the workers: a batch system sends them to every process. 0 when all workers succeeded, 128 + N
    for a worker killed by signal N, 1 when the nodes lose or never had contact.
    """
    # Workers inherit that SIGUSR1 is ignored until they handle it: asking them to stop while they start must not kill
    # them. They do not inherit a handler of SIGTERM: a worker that has nothing to save ends at once.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    # A terminal that closes knows this process alone, and the agent would leave the workers 30 seconds to save.
    if signal.SIGHUP in heeded():
        signal.signal(signal.SIGHUP, lambda number, frame: _signal_workers(number))
    interrupting = "SIGINT,SIGQUIT" if signal.SIGINT in heeded() else "SIGQUIT"
    # The agent logs at length what the workers print or `_exit_code` does.
    logging.disable(logging.CRITICAL)
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        return _run([f"--signals-to-handle={interrupting}", *words], [])
    finally:
        logging.disable(logging.NOTSET)
        # Python's own end takes the handler away before the process is gone.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def launch(words: Sequence[str]) -> int:
    """Run torchrun with `words`, with nothing printed but what the workers print, and give an exit code as `main` does.

    SIGTERM, SIGUSR1, SIGINT (Ctrl-C) and SIGHUP are forwarded to the workers, which save and end; EXIT_INTERRUPTED also
    when they had nothing to save.
    """
    asked: list[str] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number).name)
        # Python's own answer to SIGINT would be a traceback of a worker that is still starting.
        _signal_workers(signal.SIGTERM if number == signal.SIGINT else number)

    # The agent logs at length what the workers print or `_exit_code` does, and torch's C++ a trace of the stack when
    # another node ends first.
    logging.disable(logging.CRITICAL)
    with handled(forward, lambda: bool(asked)):
        try:
            _import_torch_quietly()
            return _run(["--signals-to-handle=SIGQUIT", *words], asked)
        finally:
            decide()
            logging.disable(logging.NOTSET)


def _run(words: Sequence[str], asked: list[str]) -> int:
    """Run torchrun; `asked`: names of the signals that asked this process to stop, which the caller adds to."""
    # Imported after the signals are taken care of: it takes seconds.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import parse_args, run

    _restart_only_after_crashes(asked)
    if asked:
        return _interrupted(asked)
    try:
        run(parse_args(list(words)))
    except ChildFailedError as error:
        if asked and _stopped(error.failures):
            # One that listened has reported it.
            told = any(failure.exitcode == EXIT_INTERRUPTED for failure in error.failures.values())
            return EXIT_INTERRUPTED if told else _interrupted(asked)
        return _exit_code(error.failures)
    except SignalException as error:
        return 128 + error.sigval
    except RendezvousError as error:
        print(
            f"error: {socket.gethostname()} has no contact with the other nodes of the run: one of them has ended, or "
            f"--rdzv-endpoint differs or cannot be reached ({type(error).__name__}: {error}).",
            file=sys.stderr,
            flush=True,
        )
        return 1
    return 0


def _import_torch_quietly() -> None:
    """Import torch with its C++ silent below errors, which it decides then; the workers do not inherit that."""
    name = "TORCH_CPP_LOG_LEVEL"
    if name in os.environ:
        return
    os.environ[name] = "ERROR"
    try:
        importlib.import_module("torch")
    finally:
        del os.environ[name]


def _signal_workers(number: int) -> None:
    """Send a signal to the workers: those children of this process that have a rank."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "RANK" in child.environ():
                child.send_signal(number)


def _restart_only_after_crashes(asked: list[str]) -> None:
    """Let --max-restarts restart workers that crashed, and none that said why they ended or were asked to.

    The agent has no hook for that: the class that launchers use is replaced by one that sets its count of restarts.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.launcher import api

    class Agent(LocalElasticAgent):
        _remaining_restarts: int

        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            codes = [failure.exitcode for failure in (result.failures or {}).values()]
            if asked or any(code in FINAL for code in codes):
                self._remaining_restarts = 0
            elif codes and self._remaining_restarts > 0:
                left = self._remaining_restarts - 1
                print(
                    f"warning: a rank crashed: starting all again, {left} restarts left.", file=sys.stderr, flush=True
                )
            return result

    api.LocalElasticAgent = Agent  # type: ignore[misc]


def _stopped(failures: Mapping[int, ProcessFailure]) -> bool:
    """True when the signal that was forwarded ended all workers, whether they listened for it yet or not."""
    return all(failure.exitcode in _STOPPED for failure in failures.values())


def _interrupted(asked: list[str]) -> int:
    print(f"interrupted: {asked[0]} came before there was a step to save.", file=sys.stderr, flush=True)
    return EXIT_INTERRUPTED


def _exit_code(failures: Mapping[int, ProcessFailure]) -> int:
    """Exit code of the first failure, which is also told in a sentence where the worker cannot have told it."""
    # Once a worker has failed, torchrun ends the others with SIGTERM: those are no causes.
    ended = (-signal.SIGTERM, EXIT_INTERRUPTED)
    rank, failure = min(failures.items(), key=lambda item: (item[1].exitcode in ended, item[1].timestamp))
    code = failure.exitcode
    if code not in TOLD_BY_WORKERS:
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        print(f"error: rank {rank} on {socket.gethostname()} {end}.", file=sys.stderr, flush=True)
    elif rank == failure.local_rank:
        _print_for_rank_0(failure)
    return code if code > 0 else 128 - code


def _print_for_rank_0(failure: ProcessFailure) -> None:
    """Print what a worker of rank 0's node found and left to rank 0, which was ended before it came so far."""
    found: Any = failure.message
    extra = found.get("extraInfo", {}) if isinstance(found, dict) else {}
    of_rank_0 = Path(failure.error_file).parent.parent / "0" / Path(failure.error_file).name
    if extra.get("printed") is False and not of_rank_0.exists():
        print(found["message"], file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

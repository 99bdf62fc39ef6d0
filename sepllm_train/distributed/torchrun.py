"""torchrun for batch systems: its own exit code is the workers', and signals are left to the workers.

    python -m sepllm_train.distributed.torchrun --nproc-per-node=8 scripts/pretrain.py +experiment=pythia160m_sep

torchrun ends with 1 whatever ended its workers, and kills them 30 seconds after a SIGTERM. But a batch script has to
tell an interrupted run from a mistake, and a large checkpoint takes longer than that. Options and everything else are
torchrun's own.
"""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sepllm_train.base.errors import EXIT_BAD_STEPS, EXIT_INTERRUPTED, EXIT_LOST_RANK, EXIT_USER_ERROR

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# A worker that ends with one of these has printed the reason.
TOLD_BY_WORKERS = (EXIT_USER_ERROR, EXIT_BAD_STEPS, EXIT_LOST_RANK, EXIT_INTERRUPTED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun with `arguments` (default: the command line) and give the exit code of the worker that failed first.

    0 when all workers succeeded, 128 + N for a worker killed by signal N, 1 when the nodes lose or never had contact.
    """
    _leave_signals_to_workers()
    # Imported after the signals are taken care of: it takes seconds.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import main as torchrun

    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        torchrun(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *words])
    except ChildFailedError as error:
        return _exit_code(error.failures)
    except RendezvousError as error:
        print(
            f"error: {socket.gethostname()} has no contact with the other nodes of the run: one of them has ended, or "
            f"--rdzv-endpoint differs or cannot be reached ({type(error).__name__}: {error}).",
            file=sys.stderr,
            flush=True,
        )
        return 1
    finally:
        # Python's own end takes the handler away before the process is gone.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return 0


def _leave_signals_to_workers() -> None:
    """Survive SIGUSR1 and SIGTERM, which a batch system sends to every process of a job.

    SIGUSR1 is ignored, which workers inherit until they handle it: asking them to stop while they start must not kill
    them. SIGTERM gets a handler, which they do not inherit: a worker that has nothing to save ends at once.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: None)


def _exit_code(failures: dict[int, ProcessFailure]) -> int:
    """Exit code of the first failure, which is also reported where the worker cannot have done so."""
    # Once a worker has failed, torchrun ends the others with SIGTERM: those are no causes.
    rank, failure = min(failures.items(), key=lambda item: (item[1].exitcode == -signal.SIGTERM, item[1].timestamp))
    code = failure.exitcode
    if code not in TOLD_BY_WORKERS:
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        print(f"error: rank {rank} on {socket.gethostname()} {end}.", file=sys.stderr, flush=True)
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())

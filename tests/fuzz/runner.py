"""Runs mutated inputs in processes of their own: a crash, a hang or too much memory is a finding, not the end."""

from __future__ import annotations

import contextlib
import importlib
import mmap
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

Target = Callable[[random.Random, Path], None]
MOST_MEMORY = 1 << 30
# Of the processor, not of the clock: a busy machine makes no finding.
MOST_SECONDS = 30


@dataclass(frozen=True)
class Finding:
    """An input of a target that ended otherwise than with success or UserError; `number` and the seed make it again."""

    target: str
    number: int
    what: str


class Hang(BaseException):
    """An input took too long. No reader may catch it."""


def all_targets() -> dict[str, Target]:
    """The targets of every module tests/fuzz/targets_*.py by name."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("targets_*.py"))
    found: dict[str, Target] = {}
    for name in names:
        targets = importlib.import_module(f"tests.fuzz.{name}").TARGETS
        assert not found.keys() & targets.keys(), f"{name} has a target of another module's name"
        found |= targets
    return found


def run_one(target: str, number: int, seed: int) -> None:
    """Run one input in this process, without limits."""
    with tempfile.TemporaryDirectory() as folder:
        all_targets()[target](random.Random(f"{seed} {target} {number}"), Path(folder))


def fuzz(target: str, numbers: range, seed: int = 0) -> Iterator[Finding]:
    """The findings among the inputs `numbers` of a target."""
    context = multiprocessing.get_context("fork")
    place = mmap.mmap(-1, 8)
    start = numbers.start
    while start < numbers.stop:
        ours, theirs = context.Pipe(duplex=False)
        arguments = (target, range(start, numbers.stop), seed, place, theirs)
        process = context.Process(target=_child, args=arguments)
        process.start()
        theirs.close()
        with contextlib.suppress(EOFError):
            while True:
                yield Finding(target, *ours.recv())
        process.join()
        if not process.exitcode:
            return
        (number,) = struct.unpack("<q", place[:])
        yield Finding(target, number, f"the process ended with code {process.exitcode}")
        start = number + 1


def _child(target: str, numbers: range, seed: int, place: mmap.mmap, findings: Connection) -> None:
    """Run inputs one after the other; `place` holds the number of the one that runs."""
    run = all_targets()[target]
    signal.signal(signal.SIGVTALRM, _hang)
    # The libraries' own messages and panics are many.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            place[:] = struct.pack("<q", number)
            before = _peak()
            signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)
            try:
                run(random.Random(f"{seed} {target} {number}"), Path(folder))
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                findings.send((number, f"{type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})"))
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            if _peak() - before > MOST_MEMORY:
                findings.send((number, f"took {(_peak() - before) / 2**20:,.0f} MiB"))
            for path in Path(folder).iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    findings.close()


def _hang(*_: object) -> None:
    raise Hang(f"more than {MOST_SECONDS} s of the processor")


def _peak() -> int:
    """Most memory that this process has had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""Disturbs a training run again and again, resumes it each time, and compares where it ends with an undisturbed run.

    make chaos
    python scripts/chaos.py --kills 50 --seed 7 --folder runs/chaos

Two ranks under torchrun train a small model with frequent checkpoints. At a random moment of the start, the steps or a
save, a random rank gets kill -9, or both do, or torchrun and all of it, or a rank is asked to stop by SIGUSR1. Then the
same command is given again. A run that reaches its last step is compared with the undisturbed one - every tensor, state
of a random number generator and counter, wall-clock and ids of saves aside - and another one begins. The last line says
how many disturbances there were; the exit code is 1 when anything differs or cannot be resumed.
"""

from __future__ import annotations

import check_environment  # noqa: F401

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sepllm_train.base.console import duration
from sepllm_train.distributed.processes import children_of, send

REPOSITORY = Path(__file__).resolve().parent.parent
RANKS = 2
MODEL = (
    "+experiment=demo_sep",
    "model.layers=2",
    "model.hidden=64",
    "model.heads=4",
    "model.ffn=128",
    "data.sequence_length=128",
    "data.workers=1",
    "training.validation_interval=0",
    "training.validation_samples=4",
    "training.checkpoint_interval=3",
    "logging.interval=2",
)
# A start that shows nothing for so long, or a run that goes on so long after a kill, hangs.
PATIENCE_SECONDS = 300.0
# When: (phase, weight). In a save: between the moment its folder appears and 0.1 s later, which is about its end.
PHASES = (("start", 2), ("steps", 4), ("save", 4))
# What: (victims, weight).
VICTIMS = (("one rank", 6), ("all ranks", 1), ("all ranks and torchrun", 2), ("SIGUSR1 to one rank", 1))


class Broken(Exception):
    """A run that did not survive its disturbance: the message says how."""


@dataclass
class Chaos:
    """Disturbed runs in `folder`, each of `steps` steps; `kills` disturbances in all."""

    folder: Path
    kills: int
    steps: int
    random: random.Random
    say: Callable[[str], None]
    cache: str | None = None
    done: Counter[str] = field(default_factory=Counter)
    began: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Train undisturbed, then disturb until `kills` is reached and the last run has ended. Raises Broken."""
        self.say("undisturbed run")
        self._undisturbed("undisturbed")
        expected = digest(self.folder / "undisturbed")
        number = 0
        while self.done.total() < self.kills:
            number += 1
            name = f"disturbed{number}"
            while self.done.total() < self.kills and self._attempt(name):
                pass
            if status(self.folder / name) != "finished":
                self._undisturbed(name)
            found = digest(self.folder / name)
            if found != expected:
                raise Broken(f"{self.folder / name} ends in {found[:16]}, the undisturbed run in {expected[:16]}")
            self.say(f"{name}: ended like the undisturbed run ({found[:16]})")
            shutil.rmtree(self.folder / name)

    def _undisturbed(self, name: str) -> None:
        """Train to the end."""
        process = self._start(name)
        if process.wait(PATIENCE_SECONDS) != 0:
            raise Broken(f"{name} could not be trained to its end:\n{self._tail(name)}")

    def _attempt(self, name: str) -> bool:
        """Start or resume the run and disturb it; False when it has ended by itself before."""
        phase, victims = (pick(self.random, choices) for choices in (PHASES, VICTIMS))
        stale = self._partial(name)
        process = self._start(name)
        try:
            if not self._wait_for(phase, process, name, stale):
                if process.wait() != 0 or status(self.folder / name) != "finished":
                    raise Broken(f"{name} ended with code {process.returncode} undisturbed:\n{self._tail(name)}")
                return False
            step = self._step(name)
            if self._strike(victims, process):
                self.done[f"{victims} in {phase}"] += 1
                each = (time.monotonic() - self.began) / self.done.total()
                left = duration(each * (self.kills - self.done.total()))
                self.say(f"{self.done.total()}/{self.kills} | {name}: {victims}, in {phase}, {step} | {left} left")
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise Broken(f"{name} hangs after {victims} in {phase}:\n{self._tail(name)}") from None
        finally:
            self._end(process)
        # An attempt that was to be disturbed but was faster.
        return status(self.folder / name) != "finished"

    def _start(self, name: str) -> subprocess.Popen:
        """torchrun with the run, in a session of its own."""
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"),
            *(str(REPOSITORY / "scripts" / "pretrain.py"), *MODEL, f"training.steps={self.steps}"),
            *(f"run_root={self.folder}", f"name={name}"),
            *([f"data.cache={self.cache}"] if self.cache else []),
        ]
        with open(self._log(name), "wb") as output:
            return subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,
            )

    def _partial(self, name: str) -> set[Path]:
        """Checkpoints that are being written, or were when a rank was killed."""
        return set((self.folder / name / "checkpoints").glob("*.partial"))

    def _wait_for(self, phase: str, process: subprocess.Popen, name: str, stale: set[Path]) -> bool:
        """Wait for a random moment of a phase; False when the run ends before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        if phase == "start":
            begin = time.monotonic()
            while len(ranks_of(process.pid)) < RANKS and process.poll() is None:
                time.sleep(0.01)
            # From the birth of the ranks to about their first step: as long as it took torchrun to get them going, and
            # twice that again.
            wait = self.random.uniform(0, 3 * (time.monotonic() - begin))
        else:
            seen: Callable[[], bool] = (
                (lambda: bool(self._partial(name) - stale))
                if phase == "save"
                else lambda: "\nstep " in self._text(name)
            )
            while not seen():
                if process.poll() is not None:
                    return False
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(process.args, PATIENCE_SECONDS)
                time.sleep(0.002)
            wait = self.random.uniform(0, 0.1 if phase == "save" else 1.0)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            return True
        return False

    def _strike(self, victims: str, process: subprocess.Popen) -> bool:
        """Disturb; False when there was nothing left to disturb."""
        ranks = ranks_of(process.pid)
        if not ranks:
            return False
        one = self.random.choice(ranks)
        if victims == "SIGUSR1 to one rank":
            return send(one, signal.SIGUSR1)
        hit = {"one rank": [one], "all ranks": ranks, "all ranks and torchrun": [process.pid, *ranks]}[victims]
        return sum(send(pid, signal.SIGKILL) for pid in hit) > 0

    def _end(self, process: subprocess.Popen) -> None:
        """Nothing of an attempt may outlive it but data workers, which end by themselves."""
        for pid in (*ranks_of(process.pid), process.pid):
            send(pid, signal.SIGKILL)
        process.wait()

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _text(self, name: str) -> str:
        return self._log(name).read_text(errors="replace")

    def _tail(self, name: str) -> str:
        return self._text(name)[-4000:]

    def _step(self, name: str) -> str:
        """Progress of the attempt, in words."""
        lines = [line for line in self._text(name).splitlines() if line.startswith("step ")]
        return lines[-1].split(" (")[0] if lines else "before its first step"


def pick(chance: random.Random, choices: Sequence[tuple[str, int]]) -> str:
    """One of (choice, weight)."""
    return chance.choices([name for name, _ in choices], [weight for _, weight in choices])[0]


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the ranks that a torchrun has started."""
    return children_of(launcher, "pretrain.py")


def status(run: Path) -> str | None:
    """Of run.json; None where there is none."""
    try:
        return json.loads((run / "run.json").read_text())["status"]
    except (OSError, ValueError):
        return None


def digest(run: Path) -> str:
    """Of the newest checkpoint: see scripts/checkpoint_digest.py."""
    # Imported late: it takes seconds, in which the first run can already train.
    from sepllm_train.training import checkpoint

    return checkpoint.digest(run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50, help="disturbances in all (default 50)")
    parser.add_argument("--steps", type=int, default=150, help="steps of each run (default 150)")
    parser.add_argument("--seed", type=int, default=None, help="of the disturbances (default: another each time)")
    parser.add_argument("--folder", type=Path, default=None, help="for the runs (default: a temporary one)")
    parser.add_argument("--cache", default=None, help="data.cache of the runs")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory(prefix="chaos") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"chaos: {options.kills} disturbances, --seed {seed}, runs in {folder}", flush=True)
        chaos = Chaos(
            folder.resolve(), options.kills, options.steps, random.Random(seed), lambda line: print(line, flush=True),
            options.cache,
        )  # fmt: skip
        try:
            chaos.run()
        except Broken as error:
            print(f"error: {error}\n--seed {seed}", file=sys.stderr, flush=True)
            return 1
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(chaos.done.items()))
        took = duration(time.monotonic() - chaos.began)
        print(
            f"{chaos.done.total()} disturbances ({kinds}) in {took}: every run ended bitwise like the undisturbed one",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The ranks of a launch: train or time one case after another, each in a process group of its own.

    python -m sepllm_train.distributed.torchrun --standalone --nproc-per-node=2 -m benchmarks.multi_gpu.worker FOLDER

FOLDER/cases.json lists the cases. Rank 0 writes what the runs of case N gave to FOLDER/N.json. A rank that fails writes
its message to FOLDER/N.rankR.error and ends, which ends the launch: others may wait for it in an exchange.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sepllm_train.base.console import say
from sepllm_train.base.errors import first_line
from sepllm_train.base.files import write_whole
from sepllm_train.config.load import configuration_of
from sepllm_train.config.schema import Config
from sepllm_train.config.validate import validate
from sepllm_train.distributed.launch import Launch, device_of, launch_from_environment, model_parallel
from sepllm_train.distributed.processes import end_with_parent
from sepllm_train.model.build import check_model
from sepllm_train.training.checkpoint import digest
from sepllm_train.training.rounds import build_timed_run, interleave
from sepllm_train.training.run import train

# Of a timed round, whose seconds are per step.
STEPS_OF_A_ROUND = 2


class Worker:
    """This rank of a launch. `runs` is the folder of the run folders."""

    def __init__(self, launch: Launch, runs: Path) -> None:
        self.launch = launch
        self.runs = runs
        self.device = device_of(launch)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.store = next(iter(dist.rendezvous("env://")))[0]
        self.groups = count()

    @contextmanager
    def grid(self, config: Config) -> Iterator[None]:
        """A new process group and grid for a run; what one run leaves behind does not reach the next."""
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            # A group under the keys of an earlier one would find that one's addresses.
            store=dist.PrefixStore(f"group{next(self.groups)}", self.store),
            rank=self.launch.rank,
            world_size=self.launch.world_size,
            timeout=timedelta(seconds=config.parallel.timeout_seconds),
        )
        with model_parallel(config, self.device):
            yield
        dist.barrier()
        dist.destroy_process_group()
        torch.use_deterministic_algorithms(False)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def config(self, *overrides: str) -> Config:
        """The checked configuration of a run. Raises UserError."""
        config = configuration_of([override.replace("{runs}", str(self.runs)) for override in overrides])
        validate(config, self.launch.world_size)
        check_model(config)
        return config

    def train(self, case: dict[str, Any]) -> dict[str, Any]:
        """Train the runs of a case one after another; losses, gradient norms and digest of each, by name."""
        if self.launch.main:
            shutil.rmtree(self.runs, ignore_errors=True)
        found = {}
        for run in case["runs"]:
            config = self.config(*run["overrides"], f"name={run['name']}", f"run_root={self.runs}")
            with self.grid(config):
                dist.barrier()
                if train(config, self.launch, self.device) is not None:
                    raise RuntimeError("a signal stopped the run")
                memory = self.peak_memory()
            if self.launch.main:
                folder = self.runs / run["name"]
                found[run["name"]] = {**losses_of(folder), "memory_bytes": memory}
                if run["digest"]:
                    found[run["name"]]["digest"] = digest(folder)
        return found

    def time(self, case: dict[str, Any]) -> dict[str, Any]:
        """Time the runs of a case in interleaved rounds, in the grid of the first; figures of each, by name."""
        # So that no case inherits compilations, or their limit, from the cases before it.
        torch.compiler.reset()
        steps = f"training.steps={(case['rounds'] + 1) * STEPS_OF_A_ROUND}"
        configs = {run["name"]: self.config(*run["overrides"], steps) for run in case["runs"]}
        with self.grid(next(iter(configs.values()))):
            variants = {
                name: build_timed_run(config, self.launch.world_size, self.device) for name, config in configs.items()
            }
            for number in interleave(list(variants.values()), case["rounds"], STEPS_OF_A_ROUND, self.device):
                say(f"round {number}/{case['rounds']}")
            memory = self.peak_memory()
            found = {}
            for name, variant in variants.items():
                tokens = variant.facts.tokens_per_step
                found[name] = {
                    "tokens_per_second": tokens / statistics.median(variant.seconds),
                    "tokens_per_step": tokens,
                    "seconds": variant.seconds,
                    "parts": {key: statistics.median(part[key] for part in variant.parts) for key in variant.parts[0]},
                    # Several models share the peak.
                    "memory_bytes": memory if len(variants) == 1 else None,
                    "backends": variant.facts.backends,
                }
            del variants, variant
        return found

    def peak_memory(self) -> int | None:
        """Largest peak of the allocators of all GPUs, bytes; None on CPUs, where only whole processes have a peak."""
        if self.device.type != "cuda":
            return None
        peak = torch.tensor(float(torch.cuda.max_memory_allocated(self.device)), dtype=torch.float64)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        return int(peak)


def losses_of(folder: Path) -> dict[str, Any]:
    """Losses and gradient norms of a run, from its metrics.jsonl, a step each."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf8").splitlines()
    records = [record for record in map(json.loads, lines) if "train/loss" in record]
    return {
        "losses": [record["train/loss"] for record in records],
        "norms": [record["train/grad_norm"] for record in records],
    }


def main() -> None:
    """Entry point of one rank."""
    folder = Path(sys.argv[1])
    launch = launch_from_environment()
    end_with_parent()
    cases = json.loads((folder / "cases.json").read_text(encoding="utf8"))
    worker = Worker(launch, folder / "runs")
    kinds: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"train": worker.train, "time": worker.time}
    if launch.main:
        write_whole(folder / "ready", b"")
    for number, case in enumerate(cases):
        say(f"case {number}: {case['stage']}/{case['name']}")
        begin = time.perf_counter()
        try:
            found = kinds[case["kind"]](case)
        except BaseException as error:
            traceback.print_exc()
            write_whole(
                folder / f"{number}.rank{launch.rank}.error", f"rank {launch.rank}: {described(error)}".encode()
            )
            # No clean-up: it may wait for the other ranks.
            os._exit(1)
        if launch.main:
            content = {"runs": found, "seconds": time.perf_counter() - begin}
            write_whole(folder / f"{number}.json", json.dumps(content).encode())


def described(error: BaseException) -> str:
    """An error in one line, with its kind where the message alone does not show it."""
    known = type(error).__module__.startswith(("sepllm_train", "data_prep"))
    return first_line(error) if known else f"{type(error).__name__}: {first_line(error)}"


if __name__ == "__main__":
    main()

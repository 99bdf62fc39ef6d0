"""sepllm pretrain: train a model, in this process, under torchrun, or in ranks of its own."""

from __future__ import annotations

import argparse
import importlib.util
import os
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from sepllm_train.base.errors import UserError
from sepllm_train.cli import flags, hydra_line
from sepllm_train.config.keys import Key, matching
from sepllm_train.config.present import require_data
from sepllm_train.config.schema import Config

if TYPE_CHECKING:
    from sepllm_train.evaluation.live import LiveTasks

_USAGE = "sepllm pretrain [--nproc N] [+experiment=NAME] [GROUP=NAME] [KEY=VALUE ...]"
_EXAMPLES = """examples:
  sepllm pretrain +experiment=demo_sep
  sepllm pretrain --nproc 8 +experiment=pythia160m_sep data=prefixes 'data.prefixes=[my/text]'
  sepllm pretrain --nproc 8 --nnodes 2 --rdzv-endpoint host1:29400 +experiment=pythia1.4b_sep
  sepllm pretrain +experiment=pythia160m_sep dry_run=true
  python -m sepllm_train.distributed.torchrun --nproc-per-node=8 -m sepllm_train pretrain +experiment=pythia160m_sep"""
GROUPS = ("experiment", "model", "attention", "data", "parallel", "optim", "logging")
# Keys that are often set, with what to know first; their whole descriptions are those of the schema.
OFTEN = (
    "name", "run_root", "resume", "init_from", "dry_run", "seed", "data.prefixes", "data.sequence_length",
    "attention.window", "attention.separators", "attention.initial_tokens", "training.steps", "training.global_batch",
    "training.micro_batch", "training.precision", "training.validation_interval", "training.checkpoint_interval",
    "optim.lr", "optim.warmup_steps", "parallel.tensor", "parallel.context", "logging.interval", "logging.tracker",
    "evaluation.tasks", "evaluation.interval", "evaluation.data_dir",
)  # fmt: skip
_WIDTH = 110


def main(words: Sequence[str]) -> int:
    """Train, or explain. Raises UserError, RunStopped."""
    arguments, overrides = parser().parse_known_args(words)
    if arguments.help:
        _print_help()
        return 0
    if arguments.keys is not None:
        print_keys(arguments.keys)
        return 0
    hydra_line.check_options("pretrain", overrides, Config)
    # Hydra's own options, such as --cfg job, print and train nothing.
    if _launches(arguments) and not any(word.startswith("-") for word in overrides):
        return _launch(arguments, overrides)
    hydra_line.run("pretrain", overrides, pretrain, "pretrain", "schema", Config)
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options; what it does not know are overrides."""
    found = argparse.ArgumentParser(prog="sepllm pretrain", usage=_USAGE, add_help=False, allow_abbrev=False)
    add = found.add_argument
    add("-h", "--help", action="store_true", help="explain groups, keys and options")
    add("--keys", nargs="?", const="", metavar="PATTERN", help="print type, default and description of keys, such as"
        " --keys attention or --keys '*.window*'")  # fmt: skip
    ranks = found.add_argument_group("ranks (words and meanings are torchrun's)")
    add = ranks.add_argument
    add("--nproc", type=int, default=1, metavar="N", help="processes to start on this node, one for each GPU (1)")
    add("--nnodes", type=int, default=1, metavar="N", help="nodes; the same command is started on each (1)")
    add("--node-rank", type=int, metavar="N", help="number of this node from 0, where nodes do not find their order")
    add("--rdzv-endpoint", metavar="HOST:PORT", help="where nodes meet: a port of one of them")
    add("--rdzv-id", metavar="NAME", help="name of the job, the same on all nodes")
    add("--max-restarts", type=int, default=0, metavar="N", help="times that crashed ranks are started again (0)")
    return found


def _print_help() -> None:
    print(f"usage: {_USAGE}\n\n{_EXAMPLES}\n\ngroups and their choices (files of configs/):")
    for group in GROUPS:
        sign = "+" if group == "experiment" else ""
        print(_wrapped(f"{sign}{group}=", ", ".join(hydra_line.choices(group)), 14))
    print("\nkeys often set (default: of the schema; groups and experiments set their own):")
    known = {one.name: one for one in matching(Config, "*")}
    for name in OFTEN:
        print(_wrapped(f"{name}={_shown(known[name].default)}", known[name].description.split(". ")[0].rstrip("."), 36))
    print("\nAll keys with type, default and description: sepllm pretrain --keys [PATTERN]")
    print("The configuration that a command line makes: sepllm pretrain ... --cfg job\n")
    print(parser().format_help().partition("\n\n")[2])


def print_keys(pattern: str) -> None:
    """Print each key of the schema that fits `pattern`. Raises UserError when none does."""
    found = matching(Config, pattern)
    if not found:
        raise UserError(f"no key fits {pattern!r}: sepllm pretrain --keys prints all.")
    for one in found:
        print(_entry(one))


def _entry(one: Key) -> str:
    return f"{one.name}: {one.kind} = {_shown(one.default)}\n" + _wrapped("", one.description, 4)


def _wrapped(head: str, text: str, column: int) -> str:
    """Head and text, the text from `column` on in lines of _WIDTH."""
    first = f"  {head}".ljust(column) + (" " if len(head) + 2 >= column else "")
    return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=" " * column, break_on_hyphens=False)


def _shown(value: object) -> str:
    """A value as it is typed in an override."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _launches(arguments: argparse.Namespace) -> bool:
    """True when ranks are to be started. Raises UserError for options that do not fit together."""
    flags.at_least(arguments, 1, "nproc", "nnodes")
    flags.at_least(arguments, 0, "node_rank", "max_restarts")
    if arguments.nnodes > 1 and arguments.rdzv_endpoint is None:
        raise UserError(f"--nnodes {arguments.nnodes} needs --rdzv-endpoint HOST:PORT, where the nodes meet.")
    if arguments.node_rank is not None and arguments.node_rank >= arguments.nnodes:
        raise UserError(f"--node-rank {arguments.node_rank} must be below --nnodes {arguments.nnodes}.")
    launches = arguments.nproc > 1 or arguments.nnodes > 1 or arguments.max_restarts > 0
    if launches and "RANK" in os.environ:
        raise UserError("--nproc starts ranks, and this process is one of torchrun's: leave it out under torchrun.")
    return launches


def _launch(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Check the configuration here, where a mistake costs no start of ranks, then start them.

    Returns the exit code of the rank that failed first.
    """
    from sepllm_train.config.load import configuration_of
    from sepllm_train.config.validate import validate

    config = configuration_of(list(overrides))
    processes = arguments.nproc * arguments.nnodes
    validate(config, processes)
    require_data(config)
    _require_tasks(config, processes)
    # As torchrun does, which would say so.
    if arguments.nproc > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if arguments.max_restarts:
        # torch 2.13 reuses the rendezvous's store, where restarted ranks of gloo find the addresses of dead ones.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")

    from sepllm_train.distributed.torchrun import launch

    return launch([*_torchrun_words(arguments), "-m", "sepllm_train", "pretrain", *overrides])


def _torchrun_words(arguments: argparse.Namespace) -> list[str]:
    """The options in torchrun's words."""
    words = [f"--nproc-per-node={arguments.nproc}", f"--max-restarts={arguments.max_restarts}"]
    if arguments.rdzv_endpoint is None:
        return ["--standalone", *words]
    words += [f"--nnodes={arguments.nnodes}", f"--rdzv-endpoint={arguments.rdzv_endpoint}"]
    if arguments.rdzv_id is not None:
        words.append(f"--rdzv-id={arguments.rdzv_id}")
    if arguments.node_rank is None:
        return [*words, "--rdzv-backend=c10d"]
    return [*words, "--rdzv-backend=static", f"--node-rank={arguments.node_rank}"]


def _require_tasks(config: Config, processes: int) -> None:
    """Raise UserError for tasks of a run that are unknown, lack their files or a package: before torch is imported."""
    asked = config.evaluation
    if not asked.tasks:
        return
    from sepllm_train.evaluation.hub import offline_unless_reachable
    from sepllm_train.evaluation.options import in_keys
    from sepllm_train.evaluation.tasks import check_data, check_names

    with in_keys():
        check_names(asked.tasks)
        # Under torchrun the ranks look together, later: one of them alone may not see a file.
        if asked.data_dir is not None and "RANK" not in os.environ:
            check_data(asked.tasks, Path(asked.data_dir))
        elif asked.data_dir is None:
            offline_unless_reachable()
    for package in ("lm_eval", "transformers", *(("accelerate",) if processes > 1 else ())):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"evaluation.tasks needs the package {package}, which is not installed: python -m pip install "
                "-e '.[eval]', or leave evaluation.tasks out."
            )


def tasks_of(config: Config) -> AbstractContextManager[LiveTasks | None]:
    """The tasks that score a run while it trains, for a block; None without any."""
    if not config.evaluation.tasks:
        return nullcontext()
    from sepllm_train.evaluation.live import LiveTasks

    return LiveTasks()


def pretrain(config: Config) -> None:
    """Check the configuration, then train - or, with dry_run, print what would be trained.

    Raises UserError before any GPU work for whatever a user can mend.
    """
    from sepllm_train.config.validate import validate
    from sepllm_train.metrics.trackers import check_tracker

    by_torchrun = "RANK" in os.environ
    # A dry run by hand stands for the smallest launch that fits.
    world_size = (
        config.parallel.processes if config.dry_run and not by_torchrun else int(os.environ.get("WORLD_SIZE", 1))
    )
    validate(config, world_size)
    if not by_torchrun:
        check_tracker(config.logging)
    require_data(config)
    _require_tasks(config, world_size)

    # Imported late: megatron-core takes seconds, which a typo on the command line should not cost.
    from sepllm_train.distributed.collectives import lost_rank
    from sepllm_train.distributed.launch import device_of, launch_from_environment, process_grid, reading_group
    from sepllm_train.model.build import check_model
    from sepllm_train.training.run import dry_run, train

    launch = launch_from_environment()
    check_model(config)
    if config.dry_run:
        with reading_group(launch), tasks_of(config) as tasks:
            dry_run(config, world_size, device_of(launch), tasks)
        return
    try:
        with process_grid(config, launch) as device, tasks_of(config) as tasks:
            interrupted = train(config, launch, device, tasks)
    except RuntimeError as error:
        raise lost_rank(error, config.parallel.timeout_seconds) or error from None
    if interrupted is not None:
        raise interrupted

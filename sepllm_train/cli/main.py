"""Entry point of `sepllm`: dispatch to a command, the only error path and the only way out.

Nothing but the standard library is imported before the command: `sepllm --help` and `sepllm env` answer also where
packages are missing or broken.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sepllm_train import requirements

EXIT_KEYBOARD_INTERRUPT = 130
# Exit code that a shell gives for a program ended by SIGPIPE.
EXIT_BROKEN_PIPE = 141
# Packages of the optional extras of setup.py, by the name under which they are imported.
EXTRAS = {
    "accelerate": "eval",
    "datasets": "eval",
    "lm_eval": "eval",
    "safetensors": "hf",
    "transformers": "hf",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "wandb_workspaces": "wandb",
}


class Command(NamedTuple):
    """A command: its module below sepllm_train.cli with `main(words)`, and its line of `sepllm --help`.

    interrupted: what holds for the output after Ctrl-C; nothing is printed where it is empty.
    """

    module: str
    summary: str
    interrupted: str = ""


_NOTHING = "nothing was written"
GROUPS: dict[str, dict[str, Command]] = {
    "Train": {
        "prepare": Command("prepare", "tokenize text, mark separators, verify data", "no unfinished output was kept"),
        "pretrain": Command("pretrain", "train a model from a configuration and overrides"),
        "suite": Command("suite", "train, time and report many runs of one question"),
        "match": Command("match", "find baselines that keep as many keys as a configuration", _NOTHING),
    },
    "Look at runs": {
        "compare": Command("compare", "compare runs: loss against FLOPs, seconds and tokens"),
        "watch": Command("watch", "follow runs on a live page"),
        "dashboard": Command("dashboard", "make a W&B workspace for runs"),
        "analyze": Command("analyze", "measure what separators do in a corpus, a model and its loss", _NOTHING),
        "probe": Command("probe", "ask trained runs for facts: is a separator a summary or a sink", _NOTHING),
    },
    "Use a model": {
        "generate": Command("generate", "continue prompts with a run"),
        "stream": Command("stream", "score or continue text without end in a cache of bounded size"),
        "evaluate": Command("evaluate", "run tasks of lm-evaluation-harness; needles; KV retention; tables"),
        "export": Command("export", "write a run as a Hugging Face model"),
        "import": Command("importing", "make a checkpoint of a Hugging Face model"),
        "average": Command("average", "make a run of the mean of several checkpoints of a run", _NOTHING),
    },
    "Help": {
        "env": Command("env", "report versions, GPUs, memory and what will not work here"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line `words` (default: that of the process) and return its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    name = words[0] if words else ""
    if name == "pretrain":
        from sepllm_train.base.signals import ending_at_once

        with ending_at_once():
            requirements.end_if_unsound(requirements.checkout_of(Path(__file__).resolve().parents[1]))
            return _run(COMMANDS[name], words[1:])
    if name in COMMANDS:
        # The report on an unsound environment must come out of one.
        if name != "env":
            requirements.end_if_unsound(requirements.checkout_of(Path(__file__).resolve().parents[1]))
        return _run(COMMANDS[name], words[1:])
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"sepllm {version()}")
        return 0
    if not words:
        print(_help(), file=sys.stderr)
    else:
        print(
            f"error: sepllm has no command {name!r}{_nearest(name)}: sepllm --help lists the commands.", file=sys.stderr
        )
    return 2


def run_process() -> None:
    """Entry point of the console script."""
    sys.exit(main())


def version() -> str:
    """Version of the installed package."""
    from importlib import metadata

    try:
        return metadata.version(requirements.PROJECT)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _run(command: Command, words: list[str]) -> int:
    """Run a command; every way in which it can end becomes an exit code, and a message at most once."""
    from sepllm_train.base.errors import RunStopped, UserError, report
    from sepllm_train.base.quiet import mute

    mute()
    try:
        code = importlib.import_module(f"sepllm_train.cli.{command.module}").main(words) or 0
        sys.stdout.flush()
    except (UserError, RunStopped) as error:
        return report(error)
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        remedy = f"pip install -e '.[{EXTRAS[package]}]' in the checkout"
        return report(UserError(f"{package} is not installed: {remedy}."))
    except KeyboardInterrupt:
        if command.interrupted:
            print(f"\nInterrupted: {command.interrupted}.", file=sys.stderr)
        return EXIT_KEYBOARD_INTERRUPT
    except BrokenPipeError:
        # The reader is gone. What is left in the buffer would raise again at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return int(code)


def _help() -> str:
    """List of commands, one line each."""
    lines = ["usage: sepllm COMMAND ...", "", "Pretraining of GPTs with separator attention (SepLLM)."]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<10} {command.summary}" for name, command in commands.items())]
    return "\n".join([*lines, "", "`sepllm COMMAND --help` explains a command; `sepllm --version` prints the version."])


def _nearest(name: str) -> str:
    """' (did you mean COMMAND?)' for a mistyped command, or nothing."""
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, n=1)
    return f" (did you mean {near[0]}?)" if near else ""

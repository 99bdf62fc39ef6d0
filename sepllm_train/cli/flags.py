"""Options that several commands share, each with one name, meaning and default; parsers with one look."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from sepllm_train.base.console import fold, note
from sepllm_train.base.errors import UserError
from sepllm_train.generation.choice import (
    ATTENTIONS,
    CACHES,
    CLASSES,
    INITIAL,
    POSITIONS,
    SEPARATORS,
    SETTINGS,
    WINDOW,
    AttentionChoice,
    check_used,
)

Parser: TypeAlias = argparse.ArgumentParser
Group: TypeAlias = "argparse.ArgumentParser | argparse._ArgumentGroup"
Subcommands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
T = TypeVar("T")
DTYPES = ("fp32", "bf16", "fp16")
# Help and metavar of the settings of an AttentionChoice.
_SETTINGS = {
    "initial": ("A", f"first tokens that stay (default: as trained, else {INITIAL})"),
    "window": ("W", f"newest tokens that stay, the token itself included (default: as trained, else {WINDOW})"),
    "separators": ("S", f"number of separators that a cache keeps beyond the window ({SEPARATORS})"),
    "classes": ("NAMES", f"separator classes, such as comma,period or all (default: as trained, else {CLASSES})"),
    "capacity": ("C", "most keys that a cache holds (default: 2(A + S + W); streaming: A + W)"),
    "interval": ("D", "fixed: every D-th token in place of separators"),
    "positions": ("PLACE", "places of keys: cache (in the cache; default where it is bounded), training (in the text,"
                  " up to the model's context) or absolute (in the text, beyond it)"),
}  # fmt: skip


def parser(command: str, description: str, examples: str = "") -> Parser:
    """A parser of `sepllm COMMAND`; examples: command lines without `sepllm COMMAND`, one a line."""
    description = "\n".join(textwrap.fill(line, 110) for line in description.splitlines())
    lines = [f"  sepllm {command} {line}".rstrip() for line in examples.splitlines() if line]
    return argparse.ArgumentParser(
        prog=f"sepllm {command}",
        description=description,
        epilog="\n".join(["examples:", *lines]) if lines else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def subcommands(parser: Parser) -> Subcommands:
    """The sub-commands of a parser."""
    return parser.add_subparsers(title="commands", required=True, metavar="COMMAND")


def subcommand(commands: Subcommands, name: str, summary: str, run: Callable[..., None], example: str = "") -> Parser:
    """Add a sub-command, which calls `run` with its arguments."""
    command = commands.add_parser(name, help=summary.splitlines()[0], description=summary,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    if example:
        command.epilog = f"example:\n  {command.prog} {example}"
    command.set_defaults(run=run)
    return command


def _listed(one: Callable[[str], T], what: str) -> Callable[[str], list[T]]:
    def parse(text: str) -> list[T]:
        try:
            return [one(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {what}") from None

    return parse


numbers = _listed(int, "whole numbers such as 16,32,64")
shares = _listed(float, "shares such as 0.3,0.9")


def names(text: str) -> list[str]:
    """Names joined by commas."""
    return [name for name in text.split(",") if name]


def at_least(arguments: argparse.Namespace, least: int, *keys: str) -> None:
    """Raise UserError for an option below `least`; None is left to its default."""
    for key in keys:
        value = getattr(arguments, key)
        if value is not None and value < least:
            raise UserError(f"--{key.replace('_', '-')} {value} must be at least {least}.")


def add_run(group: Group) -> None:
    """RUN, --checkpoint."""
    add_run_folder(group)
    group.add_argument("--checkpoint", type=int, metavar="STEP", help="step of the checkpoint (default: the newest)")


def add_run_folder(group: Group) -> None:
    """RUN."""
    group.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a trained run, such as runs/NAME")


def is_run(folder: Path) -> bool:
    """True for the folder of a run."""
    return any((folder / name).is_file() for name in ("config.yaml", "run.json", "metrics.jsonl"))


def runs_in(folder: Path) -> list[Path]:
    """The runs in a folder of runs, or of a suite, by name; none where the folder is a run itself."""
    if is_run(folder) or not folder.is_dir():
        return []
    for place in (folder, folder / "runs"):
        if found := sorted(path for path in place.glob("*") if is_run(path)):
            return found
    return []


def all_runs(folders: Sequence[Path]) -> list[Path]:
    """The runs that are meant: of a folder of runs all that are in it, which a note on stderr names."""
    found: list[Path] = []
    for folder in folders:
        inside = runs_in(folder)
        if inside:
            note(fold(f"{folder} holds {len(inside)} runs: {', '.join(path.name for path in inside)}"))
        found += inside or [folder]
    return found


def require_run(folder: Path, step: int | None = None) -> None:
    """Raise UserError unless `folder` is that of a run, with a checkpoint of `step` (None: any).

    Before anything large is imported.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        _refuse_other_folders(folder)
        raise UserError(f"{path} does not exist: give the folder of a run, such as runs/NAME.")
    known = checkpoint_steps(folder)
    if step is not None and step not in known:
        steps = ", ".join(map(str, known)) or "none"
        raise UserError(f"{folder} has no checkpoint of step {step}: there are {steps}.")


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints of a run, whole or not, in order."""
    checkpoints = folder / "checkpoints"
    return sorted(int(one.name[5:]) for one in checkpoints.glob("step_*") if one.name[5:].isdecimal())


def _refuse_other_folders(folder: Path) -> None:
    """Raise UserError, which names the run that may be meant, for a folder of runs, of a checkpoint or of a model."""
    if inside := runs_in(folder):
        names = ", ".join(path.name for path in inside[:8]) + (", ..." if len(inside) > 8 else "")
        raise UserError(f"{folder} is a folder of runs ({names}): give one of them, such as {inside[0]}.")
    above = next((one for one in folder.absolute().parents if (one / "config.yaml").is_file()), None)
    if above is not None and folder.exists():
        raise UserError(f"{folder} is inside of a run: give the run itself, {above}.")
    if (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is a transformers model, not a run: give its run, such as runs/NAME, or make one of it with "
            f"`sepllm import {folder} OUTPUT`."
        )


def require_new(output: Path, *, overwrite: bool | None = None) -> None:
    """Raise UserError for an output folder that is there, in the words of hf.folder.

    overwrite: value of --overwrite, None for a command without it.
    """
    if not overwrite and (output.exists() or output.is_symlink()):
        other = "" if overwrite is None else " or pass --overwrite"
        raise UserError(f"{output} exists already: choose another name{other}.")


def add_model(group: Group) -> None:
    """RUN_OR_MODEL, --tokenizer, --dtype, --device, --threads."""
    group.add_argument("model", metavar="RUN_OR_MODEL", help="a run of ours, or a folder of a transformers model")
    group.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json or .model (default: the model's own)")
    group.add_argument("--dtype", choices=DTYPES, default="fp32", help="type of weights and computation (fp32)")
    group.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu); under torchrun cuda is each rank's")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def require_model(arguments: argparse.Namespace) -> None:
    """Raise UserError for a model or tokenizer that is not there, or bad --threads: before torch is imported."""
    at_least(arguments, 1, "threads")
    folder = Path(arguments.model)
    if not ((folder / "config.yaml").is_file() or (folder / "config.json").is_file()):
        _refuse_other_folders(folder)
        raise UserError(f"{folder} is neither a run (config.yaml) nor a transformers model (config.json).")
    require_tokenizer(arguments.tokenizer)


def require_tokenizer(path: str | Path | None) -> None:
    """Raise UserError for a tokenizer that is not there, in the words of data_prep.tokenizers."""
    if path is not None and not Path(path).exists():
        raise UserError(f"Cannot read the tokenizer {path}: No such file or directory.")


def require_file(path: str | Path | None, option: str) -> None:
    """Raise UserError when a file that an option names is not there."""
    if path is not None and not Path(path).is_file():
        raise UserError(f"{option} {path} is not a file.")


def prepare_device(arguments: argparse.Namespace) -> str:
    """Set --threads and return the device of this process. Raises UserError for one that is not there."""
    import torch

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    name = arguments.device
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is unknown: use cpu, cuda or cuda:N.")
    count = torch.cuda.device_count()
    if device.type == "cuda" and not count:
        raise UserError(f"--device {name}: there is no GPU here; use cpu.")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device {name}: there are {count} GPUs here; use one up to cuda:{count - 1}.")
    return str(name)


def add_attention(group: Group, option: str, default: str, keys: Sequence[str] = SETTINGS) -> None:
    """--attention or --cache, the `option`, and the settings `keys` of an AttentionChoice."""
    choices = ATTENTIONS if option == "attention" else CACHES
    what = "pattern: as trained, else the paper's; dense: all keys" if option == "attention" else (
        "pattern: keys that training showed; sep, streaming, fixed: of bounded size; full: all keys"
    )  # fmt: skip
    group.add_argument(f"--{option}", choices=tuple(choices), default=default, help=f"{what} ({default})")
    add_settings(group, keys)


def add_settings(group: Group, keys: Sequence[str]) -> None:
    """Settings of an AttentionChoice."""
    for key in keys:
        metavar, text = _SETTINGS[key]
        if key == "positions":
            group.add_argument("--positions", choices=POSITIONS, help=text)
        else:
            group.add_argument(f"--{key}", type=str if key == "classes" else int, metavar=metavar, help=text)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings of an AttentionChoice that were given."""
    found = {key: getattr(arguments, key, None) for key in SETTINGS}
    return {key: value for key, value in found.items() if value is not None}


def choice(arguments: argparse.Namespace, option: str) -> AttentionChoice:
    """The choice that was made with `add_attention`.

    Raises UserError for a number that is too small, or a setting that the cache does not have. The settings of an
    attention may be meant for a baseline beside it.
    """
    made = AttentionChoice(getattr(arguments, option), **settings(arguments))
    made.check()
    if option == "cache":
        check_used([made], settings(arguments), CACHES)
    return made


def add_sampling(group: Group) -> None:
    """--greedy or --temperature, --top-k, --top-p, --seed."""
    either = group.add_mutually_exclusive_group()
    either.add_argument("--greedy", action="store_true", help="take the likeliest token (the default)")
    either.add_argument("--temperature", type=float, metavar="T", help="draw at random, the more the higher")
    group.add_argument("--top-k", type=int, metavar="K", help="only from the K likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="only from the likeliest ones of this probability")
    group.add_argument("--seed", type=int, default=0, help="the same seed draws the same (0)")


def temperature(arguments: argparse.Namespace) -> float:
    """The temperature: 1 where --top-k or --top-p alone asks for drawing, 0 (greedy) by default."""
    if arguments.temperature is not None:
        return float(arguments.temperature)
    return 1.0 if not arguments.greedy and (arguments.top_k is not None or arguments.top_p is not None) else 0.0

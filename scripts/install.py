"""Make or complete the environment of `make install`; needs nothing but Python's own modules.

python3 scripts/install.py --venv .venv
python3 scripts/install.py --venv .venv --ready

The folder is looked at before anything is written to it: one sentence and exit code 2 where it cannot be used, or where
the disk is too small. `--ready` installs nothing: it exits with 1 where something is left to install.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
GB = 10**9
# Installed size and pip's downloads together. Measured: 6.6 GB with a CUDA build of torch, 2.9 GB with a CPU build.
CUDA_BUILD = 8 * GB
CPU_BUILD = 4 * GB
# What is left when torch is there, and when all was there once.
WITHOUT_TORCH = 2 * GB
AGAIN = GB // 2
# pip unpacks a wheel there before it moves it; torch's is the largest.
TEMPORARY = 2 * GB
# Files in the folder, for the last complete installation and for the one under way. Environments that the user made
# have them, too; what they say is in their lines, which are the three below.
DONE, STARTED = ".installed", ".installing"
# This script ran `python -m venv`; the folder is its own.
MADE = "made by make"
# Written when pip is started. A torch that is there without either was put there by the user.
OF_MAKE, OF_USER = "torch follows constraints.txt", "torch was chosen by the user"

_FACTS = """
import importlib.util, json, sys
from importlib import metadata
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
spec = importlib.util.find_spec("sepllm_train")
print(json.dumps({
    "python": list(sys.version_info[:3]),
    "pip": importlib.util.find_spec("pip") is not None,
    "torch": version("torch"),
    "package": spec.origin if spec else None,
}))
"""


class Failure(Exception):
    """One sentence for the user."""


class State(NamedTuple):
    """An environment's folder as it was found.

    `own` says that this script made it and may delete it. `python` is None where its interpreter does not run.
    """

    exists: bool
    own: bool
    interpreter: bool
    python: tuple[int, ...] | None
    pip: bool
    torch: str | None
    package: Path | None


def requirements() -> ModuleType:
    """The module sepllm_train/requirements.py, by its path: the package is not installed yet."""
    spec = spec_from_file_location("_requirements", str(ROOT / "sepllm_train" / "requirements.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def marks(folder: Path) -> list[str]:
    """Lines of the mark files, the newest last."""
    lines = []
    for name in (DONE, STARTED):
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf8").strip()
            # Earlier versions left .installed empty where pip had installed the torch.
            lines += text.splitlines() or ([OF_MAKE] if name == DONE else [])
    return lines


def may_delete(folder: Path) -> bool:
    """True where this script made the environment and the folder still is one, or never became one."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return MADE in marks(folder) and ("pyvenv.cfg" in names or names <= {DONE, STARTED})


def look_at(folder: Path) -> State:
    """State of the environment in `folder`, asked of its own interpreter."""
    own = may_delete(folder)
    exists = folder.is_dir() and any(folder.iterdir())
    interpreter = folder / "bin" / "python"
    there = interpreter.exists()
    try:
        # Elsewhere than in the checkout, whose folder would stand for the installed package.
        done = subprocess.run([str(interpreter), "-c", _FACTS], capture_output=True, text=True, check=True, cwd=folder)
        facts = json.loads(done.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return State(exists, own, there, None, False, None, None)
    package = Path(facts["package"]).parent if facts["package"] else None
    return State(exists, own, there, tuple(facts["python"]), facts["pip"], facts["torch"], package)


def refuse(folder: Path, state: State, chosen: tuple[int, ...] | None) -> None:
    """Raise Failure for an environment that can be used neither as it is nor after repair.

    `chosen` is the version of the interpreter that the user named, None without one.
    """
    again = "make clean && make install"
    if not state.exists:
        return
    if state.python is None:
        if state.interpreter or not state.own:
            raise Failure(f"{folder} holds no environment whose Python runs: {again} (this deletes the folder).")
        return
    version = ".".join(map(str, state.python))
    wrong = requirements().python_problem(state.python, requirements().declared().python)
    if wrong:
        raise Failure(f"{folder} was made with Python {version}: {wrong.rstrip('.')}, with {again}.")
    if chosen and chosen[:2] != state.python[:2]:
        raise Failure(
            f"{folder} was made with Python {version}, not with {'.'.join(map(str, chosen))} of PYTHON=: "
            f"leave PYTHON= out, or {again} with it."
        )
    if not state.pip and not state.own:
        raise Failure(f"{folder} is an environment without pip: {again} (this deletes the folder).")
    other = state.package and requirements().checkout_of(state.package)
    if other and other != ROOT:
        raise Failure(f"{folder} has the checkout {other} installed, not {ROOT}: {again}.")


def stale(folder: Path) -> bool:
    """True where setup.py or constraints.txt is newer than the last installation, or there was none."""
    stamp = folder / DONE
    if not stamp.is_file():
        return True
    return any((ROOT / name).stat().st_mtime > stamp.stat().st_mtime for name in ("setup.py", "constraints.txt"))


def make_folder(folder: Path, state: State) -> None:
    """A new environment, or what an interrupted installation left made usable."""
    if to_make(state):
        if state.exists:
            why = "its Python is gone" if state.python is None else "it has no pip"
            print(f"{folder} is incomplete ({why}): it is made again", flush=True)
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STARTED).write_text(f"{MADE}\n", encoding="utf8")
        # This process may run in the environment that was just deleted.
        base = getattr(sys, "_base_executable", None) or sys.executable
        run([base, "-m", "venv", str(folder)], "python -m venv")
    if (folder / STARTED).exists():
        for left in folder.glob("lib/python3*/site-packages/*.dist-info"):
            # pip was killed while it wrote this package, and would take it for installed.
            if not (left / "RECORD").exists():
                shutil.rmtree(left)


def to_make(state: State) -> bool:
    """True where `python -m venv` is to run, after refuse() has let the folder pass."""
    return state.python is None or not state.pip


def run(command: Sequence[str], what: str) -> None:
    """Run a command whose own output explains its failure."""
    if subprocess.run(command, check=False).returncode:
        raise Failure(f"{what} failed (its own message is above): mend it and run `make install` again.")


def constraints(folder: Path, torch: str | None) -> list[str]:
    """Lines of constraints.txt, with the torch that the user put into the environment in place of the shipped one.

    Raises Failure for one outside of setup.py's range.
    """
    lines = (ROOT / "constraints.txt").read_text(encoding="utf8").splitlines()
    if torch is None:
        return lines
    declared = requirements().declared().packages
    wanted = next(line for line in declared if line.startswith("torch"))
    if not in_range(torch, wanted.removeprefix("torch")):
        raise Failure(f"{folder} has torch {torch}, which is not {wanted.removeprefix('torch')}: install one that is.")
    # Triton's version follows torch's.
    return [line for line in lines if not line.startswith(("torch==", "triton"))] + [f"torch=={torch}"]


def in_range(version: str, specifier: str) -> bool:
    """Compare a version with a specifier of >=, < and == clauses, by their numbers alone."""

    def numbers(text: str) -> list[int]:
        found = []
        for part in text.split("+")[0].split(".")[:3]:
            digits = "".join(character for character in part if character.isdigit())
            found.append(int(digits) if part.isdigit() else int(digits[:1] or 0))
        return found + [0] * (3 - len(found))

    for clause in specifier.split(","):
        operator = clause.rstrip("0123456789.").strip()
        bound = numbers(clause[len(operator) :])
        here = numbers(version)
        if not {">=": here >= bound, "<": here < bound, "==": here == bound}[operator]:
            return False
    return True


def needed(folder: Path, torch: str | None, lines: list[str], pip: bool) -> tuple[int, str]:
    """Bytes that the installation takes, and the reason in words."""
    if torch is not None:
        return AGAIN if (folder / DONE).exists() else WITHOUT_TORCH, f"torch {torch} is there already"
    if cuda_build(folder / "bin" / "python" if pip else None, lines):
        return CUDA_BUILD, "with a CUDA build of torch"
    return CPU_BUILD, "with a CPU build of torch"


def cuda_build(python: Path | None, lines: list[str]) -> bool:
    """True where pip would take a torch that brings CUDA's libraries; assumed on Linux where pip cannot find out.

    `python` is the environment's, with pip; without one a temporary environment is asked.
    """
    if platform.system() != "Linux":
        return False
    wanted = next((line for line in lines if line.startswith("torch==")), "torch")
    options = ["-m", "pip", "install", "--dry-run", "--no-deps", "--quiet"]
    options += ["--disable-pip-version-check", "--ignore-installed", "--report", "-", wanted.split(";")[0].strip()]
    try:
        with tempfile.TemporaryDirectory() as temporary:
            if python is None:
                python = Path(temporary) / "bin" / "python"
                subprocess.run([sys.executable, "-m", "venv", temporary], capture_output=True, timeout=120, check=True)
            command = [str(python), *options]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        (torch,) = json.loads(done.stdout)["install"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return True
    requires: list[str] = torch["metadata"].get("requires_dist", [])
    return any(line.startswith(("nvidia-", "cuda-")) for line in requires)


def check_disk(folder: Path, torch: str | None, lines: list[str], pip: bool = True, deleted: int = 0) -> None:
    """Raise Failure where the disk of `folder`, which need not exist yet, is too small.

    `torch` is the one that pip will keep, `deleted` the bytes that go before pip starts. pip, of the environment where
    it has one, is asked for its build only where that decides.
    """
    temporary = Path(tempfile.gettempdir())
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if torch is None and temporary.stat().st_dev != place.stat().st_dev:
        left = shutil.disk_usage(temporary).free
        if left < TEMPORARY:
            raise Failure(
                f"{temporary} has {left / GB:.1f} GB left, and pip unpacks torch there, which takes about "
                f"{TEMPORARY / GB:.0f} GB: set TMPDIR to a folder on a larger disk."
            )
    free = shutil.disk_usage(place).free + deleted
    if free >= CUDA_BUILD:
        return
    size, why = needed(folder, torch, lines, pip)
    if free < size:
        help = " (on a machine without a GPU install PyTorch's CPU build first: README)" if size == CUDA_BUILD else ""
        raise Failure(
            f"{folder} needs about {size / GB:.1f} GB {why}, and {free / GB:.1f} GB are free on its disk: "
            f"free some or move the checkout{help}."
        )


def size_of(folder: Path) -> int:
    """Bytes that deleting `folder` frees."""
    found = [path.lstat() for path in folder.rglob("*")]
    return sum(status.st_blocks * 512 for status in found if status.st_nlink == 1)


def install(folder: Path, state: State, extras: str) -> None:
    """Install the checkout, editable, with `extras` into the environment, which is made where there is none."""
    found = None if to_make(state) else state.torch
    said = [line for line in marks(folder) if line in (OF_MAKE, OF_USER)]
    chosen = None if said[-1:] == [OF_MAKE] else found
    lines = constraints(folder, chosen)
    kept = chosen
    if found and not chosen:
        shipped = next(line for line in lines if line.startswith("torch==")).removeprefix("torch")
        kept = found if in_range(found, shipped) else None
    # Before anything is written: a user who is told to install a CPU build comes back to a folder without marks.
    deleted = size_of(folder) if to_make(state) and state.exists else 0
    check_disk(folder, kept, lines, not to_make(state), deleted)
    make_folder(folder, state)
    made = [MADE] if MADE in marks(folder) else []
    (folder / STARTED).write_text("\n".join([*made, OF_USER if chosen else OF_MAKE, ""]), encoding="utf8")
    python = state.python if state.python and state.pip else sys.version_info[:3]
    version = ".".join(map(str, python))
    print(f"installing into {folder} (Python {version}); the first time takes minutes", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        limits = Path(temporary) / "constraints.txt"
        limits.write_text("\n".join([*lines, ""]))
        command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
        if not sys.stdout.isatty():
            # On a terminal pip shows what it downloads, several GB for a CUDA build, and how long that takes.
            command.append("--quiet")
        run([*command, "-c", str(limits), "-e", f"{ROOT}[{extras}]"], "pip install")
    os.replace(folder / STARTED, folder / DONE)
    os.utime(folder / DONE)
    print(f"installed; now type: source {os.path.relpath(folder)}/bin/activate", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the environment; gives the exit code."""
    parser = argparse.ArgumentParser(description="Make or complete the environment of `make install`.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", metavar="FOLDER", help="its folder (.venv)")
    parser.add_argument("--extras", default="dev", help="extras of setup.py (%(default)s)")
    parser.add_argument("--chosen", metavar="PYTHON", help="the interpreter that the user named, if any")
    parser.add_argument("--ready", action="store_true", help="install nothing; exit code 1 where something is left")
    options = parser.parse_args(arguments)
    folder: Path = options.venv.absolute()
    try:
        state = look_at(folder)
        refuse(folder, state, version_of(options.chosen) if options.chosen else None)
        usable = state.python is not None and state.pip and state.package is not None
        if usable and not stale(folder):
            return 0
        if options.ready:
            return 1
        install(folder, state, options.extras)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {folder} cannot be made: {error}.", file=sys.stderr)
        return 2
    return 0


def version_of(interpreter: str) -> tuple[int, ...] | None:
    """Version of an interpreter by its name or path; None where it does not run (find_python.sh tells that)."""
    command = [interpreter, "-c", "import sys; print(*sys.version_info[:3])"]
    try:
        done: Any = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return tuple(map(int, done.stdout.split()))


if __name__ == "__main__":
    raise SystemExit(main())
